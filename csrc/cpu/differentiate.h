// One pass over the scores of a block of queries and a run of keys: five products, 10 units of work.
//
//   P  = 2^(K Q^T - lse)                                   [key][lane], lse of the whole softmax
//   dV[key][d]  += P' dO                                   P' = P times the dropout factor
//   dP = V dO^T,  dS = P (dropout factor * dP - delta)     delta = sum_d dO O - d lse
//   dK[key][d]  += dS (scale Q)
//   dQ[d][lane] += K^T dS                                  times scale when written
//
// Because lse is final, the parts over different segments are independent, and nothing is ever differentiated
// through a merge. All operands in scratch and all sums are float32. A product nobody asked for is not
// computed: dV alone needs two of the five, dK or dQ alone three.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attend.h"
#include "keys.h"

namespace prefix_fast {

constexpr int64_t kBackwardTile = 64;  // keys

// Where the gradient of a run's keys or values is summed: rows [position][D], `stride` floats apart. Null:
// not wanted.
struct Sum {
    float* data = nullptr;
    int64_t stride = 0;
};

struct RunSums {
    Sum key, value;
};

// What the backward keeps of a block of queries while the keys pass.
struct BlockState {
    const float *query_lanes = nullptr, *query_rows = nullptr;  // log2 units; times scale (only for dK)
    const float *grad_lanes = nullptr, *grad_rows = nullptr;    // dO
    alignas(64) float lse[kLanes];  // log2 units; +inf where a query saw nothing: P = 0
    alignas(64) float delta[kLanes];
    float* query_grad = nullptr;  // [g][D][16]; null: not wanted
};

// delta = sum_d dO O, per lane and in the order in which dP is summed: for a query with one key the two then
// cancel exactly.
inline void load_delta(const Problem& p, const LaneBlock& block, const TokenView& out, BlockState& state) {
    const int64_t step = group_stride(p.head_dim);
    float* rows = scratch()[kOutRows].floats(kLanes * row_stride(p.head_dim));
    float* lanes = scratch()[kOutLanes].floats(kGroups * step);
    read_lanes(out, block, p.head_dim, 1.0f, rows);
    rows_to_lanes(rows, block.groups, p.head_dim, lanes);
    for (int g = 0; g < block.groups; ++g) {
        for (int v = 0; v < kGroup; v += kWidth) {
            Vec sum{};
            for (int64_t d = 0; d < p.head_dim; ++d) {
                const int64_t at = g * step + d * kGroup + v;
                sum = fma(load(lanes + at), load(state.grad_lanes + at), sum);
            }
            store(state.delta + g * kGroup + v, sum);
        }
    }
}

inline void load_statistics(const Problem& p, const LaneBlock& block, const Saved& saved, BlockState& state) {
    std::fill_n(state.lse, kLanes, kInf);
    load_delta(p, block, saved.out, state);
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t b = block.row[lane], h = block.head[lane], i = block.query[lane];
        const float lse = read_element(saved.lse.at(b, h, i), DType::kFloat32);
        if (lse == -kInf) continue;
        state.lse[lane] = std::max(lse * kLog2E, kLowest);
        if (saved.grad_lse) state.delta[lane] -= read_element(saved.grad_lse.at(b, h, i), DType::kFloat32);
    }
}

inline void load_block(const Problem& p, const LaneBlock& block, const Saved& saved, bool want_keys,
                       bool want_query, BlockState& state) {
    const int64_t rows = kLanes * row_stride(p.head_dim), lanes = kGroups * group_stride(p.head_dim);
    state.query_lanes = load_queries(p, block);
    if (want_keys) {
        float* query_rows = scratch()[kQueryRows].floats(rows);
        read_lanes(p.query, block, p.head_dim, p.scale, query_rows);
        state.query_rows = query_rows;
    }
    float* grad_rows = scratch()[kGradRows].floats(rows);
    float* grad_lanes = scratch()[kGradLanes].floats(lanes);
    read_lanes(saved.grad_out, block, p.head_dim, 1.0f, grad_rows);
    rows_to_lanes(grad_rows, block.groups, p.head_dim, grad_lanes);
    state.grad_rows = grad_rows;
    state.grad_lanes = grad_lanes;
    load_statistics(p, block, saved, state);
    if (want_query) {
        state.query_grad = scratch()[kOutLanes].floats(lanes);
        std::fill_n(state.query_grad, lanes, 0.0f);
    }
}

// S -> P in place, and P' when there is dropout. P is at most 1 even where lse is so large (a row of nothing
// but biases of -1e9) that its rounding exceeds the differences between scores.
inline void probability_tile(const LaneBlock& block, const KeyTile& tile, const BlockState& state,
                             int64_t step, const float* keep, float* scores, float* kept) {
    for (int g = 0; g < block.groups; ++g) {
        for (int v = 0; v < kGroup; v += kWidth) {
            const Vec lse = load(state.lse + g * kGroup + v);
            for (int64_t j = 0; j < tile.needed[g]; ++j) {
                const int64_t at = g * step + j * kGroup + v;
                const Vec weight = exp2(min(Vec{}, load(scores + at) - lse));
                store(scores + at, weight);
                if (keep != nullptr) store(kept + at, weight * load(keep + at));
            }
        }
    }
}

// dP -> dS in place.
inline void grad_score_tile(const LaneBlock& block, const KeyTile& tile, const BlockState& state,
                            int64_t step, const float* keep, const float* weights, float* grads) {
    for (int g = 0; g < block.groups; ++g) {
        for (int v = 0; v < kGroup; v += kWidth) {
            const Vec delta = load(state.delta + g * kGroup + v);
            for (int64_t j = 0; j < tile.needed[g]; ++j) {
                const int64_t at = g * step + j * kGroup + v;
                const Vec grad = keep != nullptr ? load(grads + at) * load(keep + at) : load(grads + at);
                store(grads + at, load(weights + at) * (grad - delta));
            }
        }
    }
}

// sum[start + key][d] += sum over lanes of weights[key][lane] rows[lane][d], over the lanes that see the key.
inline void sum_tile(const LaneBlock& block, const KeyTile& tile, int64_t head_dim, const float* weights,
                     int64_t step, const float* rows, Sum sum) {
    const int64_t stride = row_stride(head_dim), columns = round_up(head_dim, kGroup);
    int64_t done = 0;
    for (int g = 0; g < block.groups; ++g) {  // needed never decreases with g
        const int64_t count = tile.needed[g] - done;
        if (count <= 0) continue;
        product_lanes(count, columns, block.groups - g, weights + g * step + done * kGroup, step,
                      rows + g * kGroup * stride, stride, sum.data + (tile.start + done) * sum.stride,
                      sum.stride);
        done = tile.needed[g];
    }
}

// Every wanted gradient of the block's queries against the run's keys.
inline void differentiate(const Problem& p, const LaneBlock& block, const BlockState& state,
                          const KeyRun& run, RunSums sums) {
    const bool want_scores = state.query_grad != nullptr || sums.key.data != nullptr;
    if (!want_scores && sums.value.data == nullptr) return;
    const int64_t step = group_stride(kBackwardTile);
    float* scores = scratch()[kScores].floats(kGroups * step);
    float* grads = scratch()[kGradScores].floats(kGroups * step);
    float* keep = p.dropout ? scratch()[kDropout].floats(kGroups * step) : nullptr;
    float* kept = p.dropout ? scratch()[kKept].floats(kGroups * step) : scores;
    for (int64_t start = run.first; start < run.last; start += kBackwardTile) {
        KeyTile tile;
        if (!bound_tile(block, run, start, std::min(kBackwardTile, run.last - start), tile)) continue;
        tile.key = tile_rows(run, run.key, run.key_stride, run.key_dtype, start, tile.count, p.head_dim,
                             block.groups > 1, scratch()[kKeyTile]);
        score_tile(block, tile, tile.key, p.head_dim, state.query_lanes, scores, step);
        mask_scores(p, block, run, tile, scores, step);
        if (keep != nullptr) dropout_tile(p, block, run, tile, keep, step);
        probability_tile(block, tile, state, step, keep, scores, kept);
        if (sums.value.data != nullptr)
            sum_tile(block, tile, p.head_dim, kept, step, state.grad_rows, sums.value);
        if (!want_scores) continue;
        tile.value = tile_rows(run, run.value, run.value_stride, run.value_dtype, start, tile.count,
                               p.head_dim, block.groups > 1, scratch()[kValueTile]);
        score_tile(block, tile, tile.value, p.head_dim, state.grad_lanes, grads, step);
        grad_score_tile(block, tile, state, step, keep, scores, grads);
        if (sums.key.data != nullptr)
            sum_tile(block, tile, p.head_dim, grads, step, state.query_rows, sums.key);
        if (state.query_grad != nullptr)
            weigh_tile(block, tile, tile.key, p.head_dim, grads, step, state.query_grad);
    }
}

}  // namespace prefix_fast
