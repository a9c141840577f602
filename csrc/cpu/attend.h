// Online softmax of a block of queries over runs of keys, queries on the vector lanes.
//
//   S[key][lane] = K Q^T (log2 units)      m' = max(m, max S)      P = 2^(S - m')
//   l = l 2^(m - m') + sum P               O[d][lane] = O 2^(m - m') + V^T P
//
// q, k, v are read as float32, everything is accumulated in float32. Maximum, sum and mask are per lane, so
// nothing is ever reduced across a vector. A masked score is -inf and adds exactly nothing: tiles that a lane
// does not see leave its state bit for bit as it was.
#pragma once

#include <algorithm>
#include <cstdint>

#include "keys.h"

namespace prefix_fast {

constexpr int64_t kForwardTile = 128;  // keys

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

// Read the block's queries, times scale * log2 e, into [g][D][16].
inline const float* load_queries(const Problem& p, const LaneBlock& block) {
    float* rows = scratch()[kQueryRows].floats(kLanes * row_stride(p.head_dim));
    float* lanes = scratch()[kQueryLanes].floats(kGroups * group_stride(p.head_dim));
    read_lanes(p.query, block, p.head_dim, p.scale * kLog2E, rows);
    rows_to_lanes(rows, block.groups, p.head_dim, lanes);
    return lanes;
}

// S = A B for the keys that each group needs; A is [key][D] in place, B is [g][D][16].
inline void score_tile(const LaneBlock& block, const KeyTile& tile, Matrix rows, int64_t head_dim,
                       const float* lanes, float* scores, int64_t step) {
    const int64_t lane_step = group_stride(head_dim);
    if (tile.uniform) {
        product_rows<Contiguous::kInner, false>(tile.count, head_dim, block.groups, rows, lanes, lane_step,
                                                scores, step);
        return;
    }
    for (int g = 0; g < block.groups; ++g) {
        product_rows<Contiguous::kInner, false>(tile.needed[g], head_dim, 1, rows, lanes + g * lane_step,
                                                lane_step, scores + g * step, step);
    }
}

// O[g][d][lane] += sum over keys of A[key][d] weight[g][key][lane]
inline void weigh_tile(const LaneBlock& block, const KeyTile& tile, Matrix rows, int64_t head_dim,
                       const float* weights, int64_t step, float* out) {
    const int64_t out_step = group_stride(head_dim);
    if (tile.uniform) {
        product_rows<Contiguous::kRows, true>(head_dim, tile.count, block.groups, rows, weights, step, out,
                                              out_step);
        return;
    }
    for (int g = 0; g < block.groups; ++g) {
        product_rows<Contiguous::kRows, true>(head_dim, tile.needed[g], 1, rows, weights + g * step, step,
                                              out + g * out_step, out_step);
    }
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

// Scores become weights, in place; the state moves to the new maximum. `keep`: dropout factors of the weights
// that meet the values; the sum is that of the undropped softmax.
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
            for (int64_t j = 0; j < tile.needed[g]; ++j) {
                const Vec weight = exp2(load(column + j * kGroup) - origin);
                sum += weight;
                store(column + j * kGroup, keep ? weight * load(keep + g * step + j * kGroup + v) : weight);
            }
            store(l, fma(load(l), shrink, sum));
            store(m, maximum);
            if (!any_not_equal(shrink, broadcast(1.0f))) continue;
            float* out = state.out + g * out_step + v;
            for (int64_t d = 0; d < head_dim; ++d) store(out + d * kGroup, load(out + d * kGroup) * shrink);
        }
    }
}

// Fold keys [first, last) of the run into the state.
inline void attend(const Problem& p, const LaneBlock& block, const float* queries, const KeyRun& run,
                   int64_t first, int64_t last, SoftmaxState& state) {
    const int64_t step = group_stride(kForwardTile);
    float* scores = scratch()[kScores].floats(kGroups * step);
    float* keep = p.dropout ? scratch()[kDropout].floats(kGroups * step) : nullptr;
    for (int64_t start = first; start < last; start += kForwardTile) {
        KeyTile tile;
        if (!bound_tile(block, run, start, std::min(kForwardTile, last - start), tile)) continue;
        tile.key = tile_rows(run, run.key, run.key_stride, run.key_dtype, start, tile.count, p.head_dim,
                             block.groups > 1, scratch()[kKeyTile]);
        tile.value = tile_rows(run, run.value, run.value_stride, run.value_dtype, start, tile.count,
                               p.head_dim, block.groups > 1, scratch()[kValueTile]);
        score_tile(block, tile, tile.key, p.head_dim, queries, scores, step);
        mask_scores(p, block, run, tile, scores, step);
        if (keep != nullptr) dropout_tile(p, block, run, tile, keep, step);
        online_softmax_update(block, tile, p.head_dim, scores, step, keep, state);
        weigh_tile(block, tile, tile.value, p.head_dim, scores, step, state.out);
    }
}

}  // namespace prefix_fast
