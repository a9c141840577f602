// One pass over the scores of a block of queries and a run of keys: five products, 10 units of work.
//
//   P  = 2^(K Q^T - lse)                                   [key][lane], lse of the whole softmax
//   dV[key][d]  += P' dO                                   P' = P times the dropout factor
//   dP = V dO^T,  dS = P (dropout factor * dP - delta)     delta = sum_d dO O - d lse; with a softcap dS has
//                                                          its slope 1 - tanh^2 too
//   dK[key][d]  += dS (scale Q)                            the scale is in Q, or in dS for pairs of bfloat16
//   dQ[d][lane] += K^T dS                                  times scale when written, unless dS has it
//
// Because lse is final, the parts over different segments are independent, and nothing is ever differentiated
// through a merge. All sums are float32. A product nobody asked for is not
// computed: dV alone needs two of the five, dK or dQ alone three.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attend.h"
#include "keys.h"
#include "scores.h"
#include "window.h"

namespace prefix_fast {

constexpr int64_t kBackwardTile = 64;  // keys

// Where the gradient of a run's keys or values is summed: rows [position][D], `stride` floats apart. Null:
// not wanted. Positions from `written` on hold nothing yet: the first tile there assigns instead of adding.
struct Sum {
    float* data = nullptr;
    int64_t stride = 0;
    int64_t written = 0;

    // Zeros up to `end`, where nothing was written.
    void clear_to(int64_t end, int64_t columns) {
        for (; data != nullptr && written < end; ++written)
            std::fill_n(data + written * stride, columns, 0.0f);
    }
};

struct RunSums {
    Sum key, value;

    void clear_to(int64_t end, int64_t columns) {
        key.clear_to(end, columns);
        value.clear_to(end, columns);
    }
};

// What the backward keeps of a block of queries while the keys pass.
struct BlockState {
    const float *query_lanes = nullptr, *query_rows = nullptr;  // log2 units; times scale (only for dK)
    float score_scale = 1.0f, query_scale = 1.0f;               // of dS; of dQ when it is written
    const float *grad_lanes = nullptr, *grad_rows = nullptr;    // dO
    alignas(64) float lse[kLanes];  // log2 units; +inf where a query saw nothing: P = 0
    alignas(64) float delta[kLanes];
    float* query_grad = nullptr;  // [g][D][16]; null: not wanted
};

// delta = sum_d dO O, per lane and in the order in which dP is summed: for a query with one key the two then
// cancel exactly.
template <class Arithmetic>
inline void load_delta(const Problem& p, const LaneBlock& block, const TokenView& out, BlockState& state) {
    float* rows = scratch()[kOutRows].floats(kLanes * row_stride(p.head_dim));
    float* lanes = scratch()[kOutLanes].floats(kGroups * group_stride(p.head_dim));
    const int64_t inner = packed<Arithmetic>(p.head_dim), step = group_stride(inner);
    read_lanes(Arithmetic{}, out, block, p.head_dim, 1.0f, rows);
    rows_to_lanes(rows, block.groups, inner, lanes);
    for (int g = 0; g < block.groups; ++g) {
        for (int v = 0; v < kGroup; v += kWidth) {
            Vec sum{};
            for (int64_t d = 0; d < inner; ++d) {
                const int64_t at = g * step + d * kGroup + v;
                sum = Arithmetic::fma(load(lanes + at), load(state.grad_lanes + at), sum);
            }
            store(state.delta + g * kGroup + v, sum);
        }
    }
}

template <class Arithmetic>
inline void load_statistics(const Problem& p, const LaneBlock& block, const Saved& saved, BlockState& state) {
    std::fill_n(state.lse, kLanes, kInf);
    load_delta<Arithmetic>(p, block, saved.out, state);
    for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t b = block.row[lane], h = block.head[lane], i = block.query[lane];
        const float lse = read_element(saved.lse.at(b, h, i), DType::kFloat32);
        if (lse == -kInf) continue;
        state.lse[lane] = std::max(lse * kLog2E, kLowest);
        if (saved.grad_lse) state.delta[lane] -= read_element(saved.grad_lse.at(b, h, i), DType::kFloat32);
    }
}

template <class Arithmetic>
inline void load_block(const Problem& p, const LaneBlock& block, const Saved& saved, bool want_keys,
                       bool want_query, BlockState& state) {
    const Arithmetic arithmetic;
    const int64_t rows = kLanes * row_stride(p.head_dim), lanes = kGroups * group_stride(p.head_dim);
    state.query_lanes = load_queries<Arithmetic>(p, block);
    if (want_keys) {
        float* query_rows = scratch()[kQueryRows].floats(rows);
        read_lanes(arithmetic, p.query, block, p.head_dim, p.scale, query_rows);
        state.query_rows = pack_rows(arithmetic, block, p.head_dim, query_rows, scratch()[kQueryPairs]);
    }
    (Arithmetic::kPack > 1 ? state.score_scale : state.query_scale) = p.scale;
    float* grad_rows = scratch()[kGradRows].floats(rows);
    float* grad_lanes = scratch()[kGradLanes].floats(lanes);
    read_lanes(arithmetic, saved.grad_out, block, p.head_dim, 1.0f, grad_rows);
    rows_to_lanes(grad_rows, block.groups, packed<Arithmetic>(p.head_dim), grad_lanes);
    state.grad_rows = pack_rows(arithmetic, block, p.head_dim, grad_rows, scratch()[kGradPairs]);
    state.grad_lanes = grad_lanes;
    load_statistics<Arithmetic>(p, block, saved, state);
    if (want_query) {
        state.query_grad = scratch()[kOutLanes].floats(lanes);
        std::fill_n(state.query_grad, lanes, 0.0f);
    }
}

// S -> P in place, and P' packed along the lanes, unless it is P itself. P is at most 1 even where lse is so
// large (a row of nothing but biases of -1e9) that its rounding exceeds the differences between scores.
template <class Arithmetic>
inline void probability_tile(const LaneBlock& block, const KeyTile& tile, const BlockState& state,
                             int64_t step, const float* keep, float* scores, float* kept) {
    for (int g = 0; g < block.groups; ++g) {
        for (int v = 0; v < kGroup; v += kWidth) {
            const Vec lse = load(state.lse + g * kGroup + v);
            for (int64_t j = 0; j < tile.needed[g]; ++j) {
                const int64_t at = g * step + j * kGroup + v;
                const Vec weight = exp2(min(Vec{}, load(scores + at) - lse));
                store(scores + at, weight);
                if (kept == scores) continue;
                write_by_lanes(Arithmetic{}, j, kept + g * step + v,
                               keep ? weight * load(keep + at) : weight);
            }
        }
    }
}

// dP -> dS, in place and packed along the keys; pairs are packed along the lanes too.
template <class Arithmetic>
inline void grad_score_tile(const LaneBlock& block, const KeyTile& tile, const BlockState& state,
                            int64_t step, const float* keep, const float* weights, float* grads,
                            float* by_lanes) {
    for (int g = 0; g < block.groups; ++g) {
        for (int v = 0; v < kGroup; v += kWidth) {
            const Vec delta = load(state.delta + g * kGroup + v), scale = broadcast(state.score_scale);
            write_by_keys(Arithmetic{}, tile.needed[g], grads + g * step + v, [&](int64_t j) {
                const int64_t at = g * step + j * kGroup + v;
                const Vec grad = keep != nullptr ? load(grads + at) * load(keep + at) : load(grads + at);
                const Vec score_grad = load(weights + at) * scale * (grad - delta);
                if (by_lanes != grads) write_by_lanes(Arithmetic{}, j, by_lanes + g * step + v, score_grad);
                return score_grad;
            });
        }
    }
}

// sum[start + key][d] (+)= sum over lanes of weights[key][lane] rows[lane][d], over the lanes that see the
// key; both packed along the lanes.
template <class Arithmetic>
inline void sum_tile(const LaneBlock& block, const KeyTile& tile, int64_t head_dim, const float* weights,
                     int64_t step, const float* rows, Sum& sum) {
    constexpr int64_t kElements = kGroup / Arithmetic::kPack;
    const int64_t stride = row_stride(head_dim), columns = round_up(head_dim, kGroup);
    const auto product = [&](int g, int64_t first, int64_t last, auto write) {
        product_lanes<Arithmetic>(last - first, columns, block.groups - g,
                                  weights + g * step + first * kElements, step, rows + g * kElements * stride,
                                  stride, sum.data + (tile.start + first) * sum.stride, sum.stride, write);
    };
    const bool first_visit = sum.written <= tile.start;
    sum.clear_to(first_visit ? tile.start : tile.start + tile.count, columns);
    int64_t done = 0;
    for (int g = 0; g < block.groups; ++g) {  // needed never decreases with g
        if (tile.needed[g] <= done) continue;
        first_visit ? product(g, done, tile.needed[g], Assign{}) : product(g, done, tile.needed[g], Add{});
        done = tile.needed[g];
    }
    if (first_visit) sum.written = tile.start + tile.count;
}

// Every wanted gradient of the block's queries against the run's keys.
template <class Arithmetic>
inline void differentiate(const Problem& p, const LaneBlock& block, const BlockState& state,
                          const KeyRun& run, RunSums& sums) {
    const Arithmetic arithmetic;
    const bool want_scores = state.query_grad != nullptr || sums.key.data != nullptr;
    if (!want_scores && sums.value.data == nullptr) return;
    const bool reused = block.groups > 1;
    const int64_t step = group_stride(kBackwardTile);
    float* scores = scratch()[kScores].floats(kGroups * step);
    float* grads = scratch()[kGradScores].floats(kGroups * step);
    float* keep = p.dropout ? scratch()[kDropout].floats(kGroups * step) : nullptr;
    constexpr bool kPairs = Arithmetic::kPack > 1;
    float* kept = p.dropout || kPairs ? scratch()[kKept].floats(kGroups * step) : scores;
    float* grads_by_lanes = kPairs ? scratch()[kPacked].floats(kGroups * step) : grads;
    const bool capped = want_scores && p.softcap > 0.0f;
    float* slopes = capped ? scratch()[kSlopes].floats(kGroups * step) : nullptr;
    Window bounds;
    const Window* window = run.slides ? &(bounds = window_of(p, block, run)) : nullptr;
    for (int64_t start = first_tile(window, run.first, kBackwardTile); start < run.last;
         start += kBackwardTile) {
        KeyTile tile;
        if (!bound_tile(block, run, window, start, std::min(kBackwardTile, run.last - start), tile)) continue;
        tile.key = tile_rows(arithmetic, run, run.key, run.key_stride, run.key_dtype, tile.start, tile.count,
                             p.head_dim, reused, scratch()[kKeyTile]);
        score_tile<Arithmetic>(block, tile, tile.key, p.head_dim, state.query_lanes, scores, step,
                               write_scores(arithmetic, p));
        finish_scores(p, block, run, window, tile, scores, step, slopes);
        if (keep != nullptr) dropout_tile(p, block, run, tile, p.keep_scale, keep, step);
        probability_tile<Arithmetic>(block, tile, state, step, keep, scores, kept);
        if (sums.value.data != nullptr)
            sum_tile<Arithmetic>(block, tile, p.head_dim, kept, step, state.grad_rows, sums.value);
        if (!want_scores) continue;
        if (slopes != nullptr) apply_slopes(block, tile, slopes, step, scores);
        tile.value = tile_rows(arithmetic, run, run.value, run.value_stride, run.value_dtype, tile.start,
                               tile.count, p.head_dim, reused, scratch()[kValueTile]);
        score_tile<Arithmetic>(block, tile, tile.value, p.head_dim, state.grad_lanes, grads, step, Assign{});
        grad_score_tile<Arithmetic>(block, tile, state, step, keep, scores, grads, grads_by_lanes);
        if (sums.key.data != nullptr)
            sum_tile<Arithmetic>(block, tile, p.head_dim, grads_by_lanes, step, state.query_rows, sums.key);
        if (state.query_grad == nullptr) continue;
        const Matrix columns =
            tile_columns(arithmetic, run, run.key, run.key_stride, run.key_dtype, tile.start, tile.count,
                         p.head_dim, reused, scratch()[kKeyColumns], tile.key);
        weigh_tile<Arithmetic>(block, tile, columns, p.head_dim, grads, step, state.query_grad);
    }
}

}  // namespace prefix_fast
