// Online softmax of a block of queries over runs of keys, queries on the vector lanes.
//
//   S[key][lane] = K Q^T (log2 units)      m' = max(m, max S)      P = 2^(S - m')
//   l = l 2^(m - m') + sum P               O[d][lane] = O 2^(m - m') + V^T P
//
// q, k, v are read as float32 (or multiplied as pairs of bfloat16, pack.h), everything is accumulated in
// float32. Maximum, sum and mask are per lane, so nothing is ever reduced across a vector. A masked score is
// -inf and adds exactly nothing: tiles that a lane does not see leave its state bit for bit as it was.
#pragma once

#include <algorithm>
#include <cstdint>

#include "keys.h"
#include "pack.h"
#include "scores.h"
#include "window.h"

namespace prefix_fast {

constexpr int64_t kForwardTile = 256;  // keys

struct SoftmaxState {
    alignas(64) float maximum[kLanes];  // m, in log2 units; -inf while nothing was seen
    alignas(64) float sum[kLanes];      // l
    float* out = nullptr;               // O [g][D][16], not yet divided by l
};

inline SoftmaxState begin_state(const Problem& p, const LaneBlock& block) {
    SoftmaxState state;
    const int64_t step = group_stride(p.head_dim);
    state.out = scratch()[kOutLanes].floats(kGroups * step);
    std::fill_n(state.maximum, kLanes, -kInf);
    std::fill_n(state.sum, kLanes, 0.0f);
    std::fill_n(state.out, block.groups * step, 0.0f);
    return state;
}

// Read the block's queries, times scale * log2 e unless they are pairs, into [g][D / pack][16].
template <class Arithmetic>
inline const float* load_queries(const Problem& p, const LaneBlock& block) {
    float* rows = scratch()[kQueryRows].floats(kLanes * row_stride(p.head_dim));
    float* lanes = scratch()[kQueryLanes].floats(kGroups * group_stride(p.head_dim));
    read_lanes(Arithmetic{}, p.query, block, p.head_dim, p.scale * kLog2E, rows);
    rows_to_lanes(rows, block.groups, packed<Arithmetic>(p.head_dim), lanes);
    return lanes;
}

// S = A B for the keys that each group needs; A is [key][D], mostly in place, B is [g][D / pack][16].
template <class Arithmetic, class Write>
inline void score_tile(const LaneBlock& block, const KeyTile& tile, Matrix rows, int64_t head_dim,
                       const float* lanes, float* scores, int64_t step, Write write) {
    const int64_t inner = packed<Arithmetic>(head_dim), lane_step = group_stride(inner);
    const auto product = [&](int64_t keys, int groups, const float* b, float* c) {
        product_rows<Arithmetic, Contiguous::kInner>(keys, inner, groups, rows, b, lane_step, c, step, write);
    };
    if (tile.uniform) return product(tile.count, block.groups, lanes, scores);
    for (int g = 0; g < block.groups; ++g)
        product(tile.needed[g], 1, lanes + g * lane_step, scores + g * step);
}

// O[g][d][lane] += sum over keys of A[key][d] weight[g][key][lane]; both packed along the keys.
template <class Arithmetic>
inline void weigh_tile(const LaneBlock& block, const KeyTile& tile, Matrix columns, int64_t head_dim,
                       const float* weights, int64_t step, float* out) {
    const int64_t out_step = group_stride(head_dim);
    const auto product = [&](int64_t keys, int groups, const float* b, float* c) {
        product_rows<Arithmetic, Contiguous::kRows>(head_dim, packed<Arithmetic>(keys), groups, columns, b,
                                                    step, c, out_step, Add{});
    };
    if (tile.uniform) return product(tile.count, block.groups, weights, out);
    for (int g = 0; g < block.groups; ++g) product(tile.needed[g], 1, weights + g * step, out + g * out_step);
}

PF_INLINE Vec column_maximum(const float* scores, int64_t keys) {
    Vec m[4] = {broadcast(-kInf), broadcast(-kInf), broadcast(-kInf), broadcast(-kInf)};
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4) {
        for (int u = 0; u < 4; ++u) m[u] = max(load(scores + (j + u) * kGroup), m[u]);
    }
    for (; j < keys; ++j) m[0] = max(load(scores + j * kGroup), m[0]);
    return max(max(m[0], m[1]), max(m[2], m[3]));
}

// Scores become weights, in place and packed along the keys; the state moves to the new maximum. `keep`: 1 or
// 0 for the weights that meet the values; the sum is that of the undropped softmax. 1 / (1 - p), which
// bfloat16 would round, comes with the division by l.
template <class Arithmetic>
inline void online_softmax_update(const LaneBlock& block, const KeyTile& tile, int64_t head_dim,
                                  float* scores, int64_t step, const float* keep, SoftmaxState& state) {
    const int64_t out_step = group_stride(head_dim);
    for (int g = 0; g < block.groups; ++g) {
        for (int v = 0; v < kGroup; v += kWidth) {
            float* column = scores + g * step + v;
            float* m = state.maximum + g * kGroup + v;
            float* l = state.sum + g * kGroup + v;
            const Vec before = load(m);
            const Vec maximum = max(column_maximum(column, tile.needed[g]), before);
            const Vec origin = select(maximum == broadcast(-kInf), Vec{}, maximum);
            const Vec shrink = exp2(before - origin);
            Vec sum{};
            write_by_keys(Arithmetic{}, tile.needed[g], column, [&](int64_t j) {
                const Vec weight = exp2(load(column + j * kGroup) - origin);
                sum += weight;
                return keep ? weight * load(keep + g * step + j * kGroup + v) : weight;
            });
            store(l, fma(load(l), shrink, sum));
            store(m, maximum);
            if (!any_not_equal(shrink, broadcast(1.0f))) continue;
            float* out = state.out + g * out_step + v;
            for (int64_t d = 0; d < head_dim; ++d) store(out + d * kGroup, load(out + d * kGroup) * shrink);
        }
    }
}

// Fold keys [first, last) of the run into the state.
template <class Arithmetic>
inline void attend(const Problem& p, const LaneBlock& block, const float* queries, const KeyRun& run,
                   int64_t first, int64_t last, SoftmaxState& state) {
    const Arithmetic arithmetic;
    const bool reused = block.groups > 1;
    const int64_t step = group_stride(kForwardTile);
    float* scores = scratch()[kScores].floats(kGroups * step);
    float* keep = p.dropout ? scratch()[kDropout].floats(kGroups * step) : nullptr;
    Window bounds;
    const Window* window = run.slides ? &(bounds = window_of(p, block, run)) : nullptr;
    for (int64_t start = first_tile(window, first, kForwardTile); start < last; start += kForwardTile) {
        KeyTile tile;
        if (!bound_tile(block, run, window, start, std::min(kForwardTile, last - start), tile)) continue;
        tile.key = tile_rows(arithmetic, run, run.key, run.key_stride, run.key_dtype, tile.start, tile.count,
                             p.head_dim, reused, scratch()[kKeyTile]);
        prefetch_values(arithmetic, run, tile, p.head_dim);
        tile.key.ahead = run.ahead;
        score_tile<Arithmetic>(block, tile, tile.key, p.head_dim, queries, scores, step,
                               write_scores(arithmetic, p));
        finish_scores(p, block, run, window, tile, scores, step);
        if (keep != nullptr) dropout_tile(p, block, run, tile, 1.0f, keep, step);
        online_softmax_update<Arithmetic>(block, tile, p.head_dim, scores, step, keep, state);
        tile.value = tile_columns(arithmetic, run, run.value, run.value_stride, run.value_dtype, tile.start,
                                  tile.count, p.head_dim, reused, scratch()[kValueTile]);
        tile.value.ahead = run.ahead;
        weigh_tile<Arithmetic>(block, tile, tile.value, p.head_dim, scores, step, state.out);
    }
}

}  // namespace prefix_fast
