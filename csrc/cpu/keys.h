// A run of keys and values that a block of queries reads, tile by tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "half.h"
#include "lanes.h"
#include "parallel.h"
#include "philox.h"
#include "problem.h"
#include "window.h"

namespace prefix_fast {

// Keys [first, last) of one segment, or of a row's own tokens.
struct KeyRun {
    const char *key = nullptr, *value = nullptr;  // position 0
    int64_t key_stride = 0, value_stride = 0;     // bytes
    DType key_dtype = DType::kFloat32, value_dtype = DType::kFloat32;
    int64_t first = 0, last = 0;
    int set = 0;                 // number of the set; the own tokens come after all sets
    bool own = false;            // causal bound and mask apply
    bool slides = false;         // the window applies
    const bool* mask = nullptr;  // of position 0; null: every key of the run may be attended
    int64_t mask_stride = 0;
    BiasView bias;
    Ahead* ahead = nullptr;  // what to ask for while the run is multiplied

    bool visible(int64_t j) const { return mask == nullptr || mask[j * mask_stride]; }
};

inline KeyRun segment_run(const Problem& p, int set, int64_t segment, int64_t kv_head) {
    const SegmentSet& s = p.sets[set];
    KeyRun run;
    run.key = s.key.at(segment, kv_head, 0);
    run.value = s.value.at(segment, kv_head, 0);
    run.key_stride = s.key.token;
    run.value_stride = s.value.token;
    run.key_dtype = s.key.dtype;
    run.value_dtype = s.value.dtype;
    run.last = s.length[segment];
    run.set = set;
    run.slides = !s.begin.empty();
    run.bias = s.bias;
    return run;
}

// The own tokens of row b. Padding at either end shortens the run; only a mask with holes is read key by key.
inline KeyRun own_run(const Problem& p, int64_t b, int64_t kv_head) {
    KeyRun run;
    run.last = p.keys_of(b);
    run.own = true;
    run.slides = p.window > 0;
    run.bias = p.bias;
    run.set = static_cast<int>(p.sets.size());
    if (run.last == 0) return run;
    run.key = p.key.at(b, kv_head, 0);
    run.value = p.value.at(b, kv_head, 0);
    run.key_stride = p.key.token;
    run.value_stride = p.value.token;
    run.key_dtype = p.key.dtype;
    run.value_dtype = p.value.dtype;
    if (p.key_mask != nullptr) {
        run.mask = p.key_mask + b * p.key_mask_row;
        run.mask_stride = p.key_mask_key;
        while (run.last > 0 && !run.visible(run.last - 1)) --run.last;
        while (run.first < run.last && !run.visible(run.first)) ++run.first;
        bool holes = false;
        for (int64_t j = run.first; j < run.last; ++j) holes |= !run.visible(j);
        if (!holes) run.mask = nullptr;
    }
    return run;
}

// One tile: keys [start, start + count), of which the lanes of group g need the first needed[g].
struct KeyTile {
    int64_t start = 0, count = 0;
    int64_t needed[kGroups] = {};
    bool uniform = true;  // all groups need all keys
    Matrix key{nullptr, 0}, value{nullptr, 0};
};

// Rows this far apart (heads between tokens) fall into a few sets of the first-level cache and evict each
// other.
constexpr int64_t kScatteredRows = 2048;  // bytes

// Keys or values of a tile as float32: in place where they are, unless they are read many times from
// scattered rows; else copied or converted, with zeros for masked keys so that whatever the caller keeps
// there cannot reach a sum.
inline Matrix tile_rows(const KeyRun& run, const char* data, int64_t stride, DType dtype, int64_t start,
                        int64_t count, int64_t head_dim, bool reused, Buffer& buffer) {
    const char* source = data + start * stride;
    const bool scattered = reused && stride >= kScatteredRows;
    if (dtype == DType::kFloat32 && run.mask == nullptr && !scattered) {
        return {reinterpret_cast<const float*>(source), stride / static_cast<int64_t>(sizeof(float)), true};
    }
    const int64_t target_stride = row_stride(head_dim);
    float* target = buffer.floats(count * target_stride);
    for (int64_t j = 0; j < count; ++j, source += stride) {
        float* row = target + j * target_stride;
        if (run.visible(start + j)) {
            read_row(source, dtype, head_dim, 1.0f, row);
        } else {
            std::memset(row, 0, static_cast<size_t>(head_dim) * sizeof(float));
        }
    }
    return {target, target_stride};
}

inline Window window_of(const Problem& p, const LaneBlock& block, const KeyRun& run) {
    return window_of(p, block, run.own ? nullptr : p.sets[run.set].begin.data(), run.last);
}

// Tiles lie on a grid, and one whose first keys have left every lane's window starts later by a multiple of
// this: which other lanes a block has then changes neither the order nor the pairs of a lane's sums.
constexpr int64_t kWindowStep = 4;

// The first tile from `first` on with a key in the window of some lane.
inline int64_t first_tile(const Window* window, int64_t first, int64_t tile_keys) {
    if (window == nullptr) return first;
    return first + std::max<int64_t>(window->lowest - first, 0) / tile_keys * tile_keys;
}

// Which keys of [start, start + count) each group needs; false when none does.
inline bool bound_tile(const LaneBlock& block, const KeyRun& run, const Window* window, int64_t start,
                       int64_t count, KeyTile& tile) {
    if (window != nullptr) {
        if (window->lowest >= start + count) return false;
        const int64_t left = std::max<int64_t>(window->lowest - start, 0) / kWindowStep * kWindowStep;
        start += left;
        count -= left;
    }
    tile.start = start;
    tile.count = 0;
    for (int g = 0; g < block.groups; ++g) {
        const int64_t bound = run.own ? std::clamp<int64_t>(block.group_high[g] - start, 0, count) : count;
        tile.needed[g] = bound;
        tile.count = std::max(tile.count, bound);
    }
    tile.uniform = true;
    for (int g = 0; g < block.groups; ++g) tile.uniform &= tile.needed[g] == tile.count;
    bool any = false;
    for (int64_t j = 0; j < tile.count && !any; ++j) any = run.visible(start + j);
    return any;
}

// keep[g][key][16] = `kept` where the weight is kept, else 0
inline void dropout_tile(const Problem& p, const LaneBlock& block, const KeyRun& run, const KeyTile& tile,
                         float kept, float* keep, int64_t step) {
    for (int lane = 0; lane < block.groups * kGroup; lane += kWidth) {
        VecU query, stream;
        for (int i = 0; i < kWidth; ++i) {
            const int from = std::min(lane + i, block.lanes - 1);  // idle lanes draw what nobody reads
            query[i] = static_cast<uint32_t>(block.query[from]);
            stream[i] = static_cast<uint32_t>(block.row[from] * p.heads + block.head[from]);
        }
        float* column = keep + lane / kGroup * step + lane % kGroup;
        const int64_t end = tile.start + tile.needed[lane / kGroup];
        for (int64_t quad = tile.start / 4; quad * 4 < end; ++quad) {
            VecU words[4] = {query, static_cast<uint32_t>(quad) - VecU{}, stream,
                             static_cast<uint32_t>(run.set) - VecU{}};
            philox(p.seed, words);
            for (int64_t j = std::max(quad * 4, tile.start); j < std::min(quad * 4 + 4, end); ++j) {
                const VecI stays = (VecI)(words[j & 3] >= p.dropout_threshold);
                store(column + (j - tile.start) * kGroup, select(stays, broadcast(kept), Vec{}));
            }
        }
    }
}

}  // namespace prefix_fast
