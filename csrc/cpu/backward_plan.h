// How the backward is cut, and where its sums are.
//
// Three phases. Segments of folded sets: an item is a segment's keys [chunk] against a chunk of the lanes of
// all its readers. Rows: an item is a chunk of rows, or of the queries of one row, against their own keys and
// the segments of walked sets. Sums: a gradient to which several chunks of lanes contributed is the sum of
// their parts, in order.
//
// A part may lie in the gradient itself (the last one of a float32 gradient), which costs no memory; the
// others are float32 rows in the scratch of the call, about kPartBytes at most.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "differentiate.h"
#include "folding.h"
#include "parallel.h"
#include "problem.h"

namespace prefix_fast {

constexpr int64_t kLaneChunk = 256;  // a part's traffic is small beside so many lanes' arithmetic
constexpr int64_t kRowPiece = 128;   // fewer where a few rows are all that there is
constexpr int64_t kPartItems = 192;  // more chunks of lanes, over all heads, are not made
constexpr int64_t kPartBytes = int64_t{1} << 27;  // nor so many that their parts take more
constexpr int64_t kKeyItems = 128;                // keys are cut until there are so many items
constexpr int64_t kMinimumKeys = 256;             // of a chunk: each reads its lanes anew
constexpr int64_t kFewItems = 48;                 // with fewer, rows are split and long segments cut
constexpr int64_t kSumRows = 64;                  // positions of an item of the last phase

// A contribution to one gradient: rows [Hkv][length][D].
struct Part {
    int64_t length = 0;
    Sum key, value;                        // of key/value head 0
    int64_t key_head = 0, value_head = 0;  // floats from head to head
    bool key_in_place = false, value_in_place = false;

    static Sum at_head(Sum sum, int64_t head_stride, int64_t kv_head) {
        if (sum.data != nullptr) sum.data += kv_head * head_stride;
        return sum;
    }
    RunSums at(int64_t kv_head) const {
        return {at_head(key, key_head, kv_head), at_head(value, value_head, kv_head)};
    }
};

// The gradients of one segment, or of one row's own keys and values, and the parts [first, last) that make
// them.
struct Unit {
    SegmentGrads grads;
    int64_t index;           // the segment, or the row
    int64_t length, extent;  // valid positions; all positions
    int64_t first_part, last_part;
};

struct WalkedSet {
    int set = 0;
    std::vector<int64_t> part_of;  // [chunks * N], -1: the chunk does not read the segment
    std::vector<bool> assigns;     // [B], the first of its chunk to read its segment
};

struct FoldedGrads {
    int set = 0;
    Readers readers;
    int64_t chunk = 0, chunks = 0;    // keys of a chunk; chunks of the longest segment
    std::vector<int64_t> first_part;  // [N], one part for each chunk of lanes
    float* query_grad = nullptr;      // [chunk][query of the call][H][D]
};

// Rows [row, end), all lanes of each; or lanes [first, last) of one row that is split.
struct RowChunk {
    int64_t row, end, first_lane = 0, last_lane = 0;
    int64_t own_part = -1;  // of a split row

    bool split() const { return last_lane > 0; }
};

struct BackwardPlan {
    int64_t lane_chunk, row_piece;  // lanes of a chunk; of a piece of a split row
    std::vector<FoldedGrads> folded;
    std::vector<WalkedSet> walked;
    std::vector<RowChunk> chunks;
    std::vector<Part> parts;
    std::vector<Unit> units;
};

inline bool splits_rows(const Problem& p) {
    return p.kv_heads * p.rows < kFewItems;
}

// Lanes of a chunk, at least `least`, that keep the number of parts and their memory within bounds.
inline int64_t lanes_per_chunk(const Problem& p, int64_t least) {
    const int64_t lanes = head_lanes(p) * p.kv_heads;
    int64_t keys = splits_rows(p) ? p.total_keys() / std::max<int64_t>(p.rows, 1) : 0;
    for (const SegmentSet& set : p.sets) keys += set.mean_extent;
    const int64_t bytes = lanes * keys * round_up(p.head_dim, kGroup) * 8;  // of one part for each lane
    return round_up(std::max({least, ceil_div(lanes, kPartItems), ceil_div(bytes, kPartBytes)}), kLanes);
}

inline bool folds_backward(const Problem& p, const SegmentSet& set, int64_t lane_chunk) {
    const int64_t row_items = p.kv_heads * ceil_div(head_lanes(p), lane_chunk);
    const bool short_of_work = row_items < kFewItems && set.mean_extent >= 4 * kMinimumKeys;
    const int64_t lanes = p.query_bound * p.group();
    const bool idle = lanes < kLanes && 8 * round_up(lanes, kGroup) > 9 * lanes;
    return short_of_work || (idle && rows_fold(p, set));
}

// Parts for every (segment, chunk of its readers' lanes).
inline void plan_folded(const Problem& p, int index, const SegmentGrads& grads, BackwardPlan& plan) {
    const SegmentSet& set = p.sets[index];
    FoldedGrads folded;
    folded.set = index;
    folded.readers = readers_of(p, set);
    const int64_t lane_chunks = std::max(ceil_div(head_lanes(p), plan.lane_chunk), set.count());
    folded.chunk = keys_per_chunk(set.mean_extent, kKeyItems, p.kv_heads * lane_chunks, kMinimumKeys);
    folded.chunks = ceil_div(longest_of(set), folded.chunk);
    for (int64_t n = 0; n < set.count(); ++n) {
        const int64_t first = static_cast<int64_t>(plan.parts.size());
        folded.first_part.push_back(first);
        plan.parts.resize(first + ceil_div(lanes_of(p, folded.readers, n), plan.lane_chunk));
        for (size_t k = first; k < plan.parts.size(); ++k) plan.parts[k].length = set.length[n];
        plan.units.push_back(
            {grads, n, set.length[n], set.extent[n], first, static_cast<int64_t>(plan.parts.size())});
    }
    plan.folded.push_back(std::move(folded));
}

// Parts for every (segment, chunk of rows that reads it), those of a segment ascending by chunk.
inline void plan_walked(const Problem& p, int index, const SegmentGrads& grads, BackwardPlan& plan) {
    const SegmentSet& set = p.sets[index];
    WalkedSet walked;
    walked.set = index;
    walked.part_of.assign(plan.chunks.size() * set.count(), -1);
    walked.assigns.assign(p.rows, false);
    std::vector<std::vector<int64_t>> chunks(set.count());
    for (int64_t c = 0; c < static_cast<int64_t>(plan.chunks.size()); ++c) {
        for (int64_t b = plan.chunks[c].row; b < plan.chunks[c].end; ++b) {
            const int64_t n = set.ids[b];
            if (n < 0 || p.queries_of(b) == 0 || (!chunks[n].empty() && chunks[n].back() == c)) continue;
            chunks[n].push_back(c);
            walked.assigns[b] = true;
        }
    }
    for (int64_t n = 0; n < set.count(); ++n) {
        const int64_t first = static_cast<int64_t>(plan.parts.size());
        for (int64_t c : chunks[n]) {
            walked.part_of[c * set.count() + n] = static_cast<int64_t>(plan.parts.size());
            plan.parts.emplace_back().length = set.length[n];
        }
        plan.units.push_back(
            {grads, n, set.length[n], set.extent[n], first, static_cast<int64_t>(plan.parts.size())});
    }
    plan.walked.push_back(std::move(walked));
}

// One row's queries in pieces of nearly equal lanes; a piece sees the own keys up to its last query.
inline void split_row(const Problem& p, const SegmentGrads& own, int64_t b, BackwardPlan& plan) {
    const int64_t lanes = p.queries_of(b) * p.group(), pieces = ceil_div(lanes, plan.row_piece);
    const int64_t step = round_up(ceil_div(lanes, pieces), kLanes),
                  first_part = static_cast<int64_t>(plan.parts.size());
    for (int64_t first = 0; first < lanes; first += step) {
        const int64_t last = std::min(first + step, lanes);
        plan.chunks.push_back({b, b + 1, first, last, static_cast<int64_t>(plan.parts.size())});
        plan.parts.emplace_back().length = own_visible(p, b, ceil_div(last, p.group()));
    }
    plan.units.push_back(
        {own, b, p.keys_of(b), p.keys_of(b), first_part, static_cast<int64_t>(plan.parts.size())});
}

inline void plan_rows(const Problem& p, const Grads& grads, bool any_walked, BackwardPlan& plan) {
    const bool split = splits_rows(p);
    int64_t gathered = plan.lane_chunk;
    for (int64_t b = 0; b < p.rows; ++b) {
        const int64_t lanes = p.queries_of(b) * p.group();
        if (split && lanes > plan.row_piece) {
            split_row(p, {grads.key, grads.value}, b, plan);
            gathered = plan.lane_chunk;
            continue;
        }
        if (!any_walked || gathered >= plan.lane_chunk) {
            plan.chunks.push_back({b, b});
            gathered = 0;
        }
        plan.chunks.back().end = b + 1;
        gathered += lanes;
    }
}

// Sums may go straight to a float32 gradient whose rows are whole vectors.
inline bool sums_in_place(const TokenView& grad, int64_t head_dim) {
    return grad && grad.dtype == DType::kFloat32 && head_dim % kGroup == 0;
}

// Place one side (keys or values) of a part: in the gradient, or at `memory` floats into the scratch of the
// call. Returns the floats used up to then.
inline int64_t place(const Problem& p, const TokenView& grad, const Unit& unit, int64_t length, bool last,
                     float* base, int64_t memory, Sum& sum, int64_t& head, bool& in_place) {
    if (!grad) return memory;
    in_place = last && length == unit.length && sums_in_place(grad, p.head_dim);
    if (in_place) {
        sum = {reinterpret_cast<float*>(grad.at(unit.index, 0, 0)), grad.token / 4, 0};
        head = grad.head / 4;
        return memory;
    }
    const int64_t stride = round_up(p.head_dim, kGroup);
    sum = {base == nullptr ? nullptr : base + memory, stride, 0};
    head = length * stride;
    return memory + p.kv_heads * head;
}

// Lay out all parts and the partial gradients of queries from `base` on; returns the floats needed. Without
// a base, only that.
inline int64_t lay_out(const Problem& p, const Grads& grads, float* base, BackwardPlan& plan) {
    int64_t memory = 0;
    for (const Unit& unit : plan.units) {
        for (int64_t k = unit.first_part; k < unit.last_part; ++k) {
            Part& part = plan.parts[k];
            const bool last = k + 1 == unit.last_part;
            memory = place(p, unit.grads.key, unit, part.length, last, base, memory, part.key, part.key_head,
                           part.key_in_place);
            memory = place(p, unit.grads.value, unit, part.length, last, base, memory, part.value,
                           part.value_head, part.value_in_place);
        }
    }
    for (FoldedGrads& folded : plan.folded) {
        if (!grads.query) continue;
        folded.query_grad = base == nullptr ? nullptr : base + memory;
        memory += folded.chunks * p.total_queries() * p.heads * p.head_dim;
    }
    return memory;
}

inline BackwardPlan make_backward_plan(const Problem& p, const Grads& grads) {
    BackwardPlan plan;
    const bool few = head_lanes(p) * p.kv_heads < kFewItems * kLaneChunk;
    plan.lane_chunk = lanes_per_chunk(p, kLaneChunk);
    plan.row_piece = few ? lanes_per_chunk(p, kRowPiece) : plan.lane_chunk;
    std::vector<int> walked;
    for (int s = 0; s < static_cast<int>(p.sets.size()); ++s) {
        if (folds_backward(p, p.sets[s], plan.lane_chunk)) {
            plan_folded(p, s, grads.sets[s], plan);
        } else {
            walked.push_back(s);
        }
    }
    plan_rows(p, grads, !walked.empty(), plan);
    for (int s : walked) plan_walked(p, s, grads.sets[s], plan);
    return plan;
}

}  // namespace prefix_fast
