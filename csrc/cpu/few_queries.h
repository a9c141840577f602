// Online softmax of one to four queries of one row, head dim on the vector lanes: a row's own tokens while
// decoding, where a block of lanes would stay nearly empty and the time is that of reading keys and values
// once.
//
//   s[l][j] = q_l . k_j (log2 units), p = 2^(s - m), O[l][d] = sum_j p[l][j] v_j[d]
//
// Sums over d run in a fixed order that depends on D and the vector width alone. float32 throughout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "keys.h"
#include "scores.h"
#include "window.h"

namespace prefix_fast {

constexpr int kFewQueries = 4;
constexpr int64_t kFewTile = 128;  // keys
constexpr int64_t kRowsAhead =
    32;  // rows in place are asked for so many before their turn, up to the run's end

struct FewState {
    float maximum[kGroup];  // of whole vectors
    float sum[kGroup];
    float* out = nullptr;  // [lane][D]
};

// Halve the vectors by adding them in pairs, until one holds the sum of each.
template <int Half>
PF_INLINE Vec sum_stage(Vec (&x)[kWidth]) {
    for (int r = 0; r < Half; ++r) {
        swap_blocks<Half>(x[r], x[r + Half], std::make_integer_sequence<int, kWidth>{});
        x[r] += x[r + Half];
    }
    if constexpr (Half > 1) return sum_stage<Half / 2>(x);
    return x[0];
}

// The sums of kWidth vectors, in their order.
PF_INLINE Vec sum_vectors(Vec (&x)[kWidth]) {
    return sum_stage<kWidth / 2>(x);
}

// The part of the products from `whole` on, where no whole vector is left.
template <int Lanes>
inline Vec dot_tails(const float* queries, int64_t stride, const float* const* key, int64_t whole,
                     int64_t head_dim) {
    float tail[kWidth];
    for (int i = 0; i < kWidth; ++i) {
        tail[i] = 0.0f;
        for (int64_t d = whole; d < head_dim; ++d)
            tail[i] += queries[i % Lanes * stride + d] * key[i / Lanes][d];
    }
    return load(tail);
}

// s[l][j] = q_l . k_j for Lanes queries (rows [lane][D], `stride` apart), kWidth / Lanes keys at a time: a
// key is read once for all of them.
template <int Lanes>
inline void dot_keys(const float* queries, int64_t stride, Matrix keys, int64_t count, int64_t asked,
                     int64_t head_dim, float (*scores)[kFewTile]) {
    constexpr int kKeys = kWidth / Lanes;
    const int64_t whole = head_dim / kWidth * kWidth;
    for (int64_t start = 0; start < count; start += kKeys) {
        const float* key[kKeys];
        for (int u = 0; u < kKeys; ++u) key[u] = keys.data + std::min(start + u, count - 1) * keys.stride;
        Vec part[kWidth];
        for (int u = 0; u < kKeys; ++u) {  // one after the other, as they lie in memory
            if (start + u < asked) prefetch_row(key[u] + kRowsAhead * keys.stride, head_dim);
            Vec sum[Lanes];
            for (int l = 0; l < Lanes; ++l) sum[l] = Vec{};
            for (int64_t d = 0; d < whole; d += kWidth) {
                const Vec column = load(key[u] + d);
                for (int l = 0; l < Lanes; ++l) sum[l] = fma(load(queries + l * stride + d), column, sum[l]);
            }
            for (int l = 0; l < Lanes; ++l) part[u * Lanes + l] = sum[l];
        }
        Vec total = sum_vectors(part);
        if (whole < head_dim) total += dot_tails<Lanes>(queries, stride, key, whole, head_dim);
        if constexpr (Lanes == 1) {
            store(scores[0] + start, total);
        } else {
            float values[kWidth];
            store(values, total);
            for (int u = 0; u < kKeys; ++u) {
                for (int l = 0; l < Lanes; ++l) scores[l][start + u] = values[u * Lanes + l];
            }
        }
    }
}

// The logits of one lane, a row of keys: as `finish_scores` makes those of a block.
inline void finish_few(const Problem& p, const LaneBlock& block, int lane, const KeyRun& run,
                       const Window* window, int64_t start, int64_t count, float* scores) {
    if (p.softcap > 0.0f) {
        const Softcap capped(p.softcap);
        Vec slope;
        for (int64_t j = 0; j < count; j += kWidth) store(scores + j, capped(load(scores + j), slope));
    }
    if (run.bias) {
        const char* bias = run.bias.at(block.row[lane], block.head[lane], block.query[lane], start);
        for (int64_t j = 0; j < count; j += kWidth) {
            const int64_t keys = std::min<int64_t>(kWidth, count - j);
            store(scores + j, load(scores + j) + read_biases(run.bias, bias + j * run.bias.key, keys));
        }
    }
    const int64_t left = window == nullptr ? 0 : std::clamp<int64_t>(window->floor[lane] - start, 0, count);
    std::fill_n(scores, left, -kInf);
    if (!run.own) return;
    const int64_t seen = std::clamp<int64_t>(block.limit[lane] - start, 0, count);
    std::fill(scores + seen, scores + count, -kInf);
    for (int64_t j = 0; run.mask != nullptr && j < count; ++j) {
        if (!run.visible(start + j)) scores[j] = -kInf;
    }
}

inline void drop_few(const Problem& p, const LaneBlock& block, int lane, const KeyRun& run, int64_t start,
                     int64_t count, float* weights) {
    const uint32_t stream = static_cast<uint32_t>(block.row[lane] * p.heads + block.head[lane]);
    for (int64_t j = start; j < start + count;) {  // a vector of four keys each
        VecU words[4] = {static_cast<uint32_t>(block.query[lane]) - VecU{}, VecU{}, stream - VecU{},
                         static_cast<uint32_t>(run.set) - VecU{}};
        const int64_t first = j / 4, end = std::min((first + kWidth) * 4, start + count);
        for (int i = 0; i < kWidth; ++i) words[1][i] = static_cast<uint32_t>(first + i);
        philox(p.seed, words);
        for (; j < end; ++j) {
            if (words[j & 3][j / 4 - first] < p.dropout_threshold) weights[j - start] = 0.0f;
        }
    }
}

// scores [count], padded to whole vectors, become weights; returns 2^(m - m'), by which O shrinks.
inline float update_few(float* scores, int64_t count, float& maximum, float& sum) {
    const int64_t padded = round_up(count, kWidth);
    std::fill(scores + count, scores + padded, -kInf);
    float highest = maximum;
    for (int64_t j = 0; j < count; ++j) highest = scores[j] > highest ? scores[j] : highest;
    const float origin = highest == -kInf ? 0.0f : highest;
    const float shrink = exp2(maximum - origin);
    Vec total{};
    for (int64_t j = 0; j < padded; j += kWidth) {
        const Vec weight = exp2(load(scores + j) - broadcast(origin));
        total += weight;
        store(scores + j, weight);
    }
    maximum = highest;
    sum = sum * shrink + sum_lanes(total);
    return shrink;
}

// O[l][d] = O[l][d] shrink[l] + sum_j p[l][j] v_j[d] for vectors [d, d + Columns) of all lanes.
template <int Lanes, int Columns>
PF_INLINE void weigh_columns(const float (*weights)[kFewTile], Matrix values, int64_t count, int64_t asked,
                             int64_t d, const float* shrink, float* out, int64_t stride) {
    Vec sum[Lanes][Columns];
    for (int l = 0; l < Lanes; ++l) {
        for (int u = 0; u < Columns; ++u)
            sum[l][u] = load(out + l * stride + d + u * kWidth) * broadcast(shrink[l]);
    }
    const float* value = values.data + d;
    for (int64_t j = 0; j < count; ++j, value += values.stride) {
        if (j < asked) prefetch_row(value + kRowsAhead * values.stride, Columns * kWidth);
        Vec column[Columns];
        for (int u = 0; u < Columns; ++u) column[u] = load(value + u * kWidth);
        for (int l = 0; l < Lanes; ++l) {
            const Vec weight = broadcast(weights[l][j]);
            for (int u = 0; u < Columns; ++u) sum[l][u] = fma(weight, column[u], sum[l][u]);
        }
    }
    for (int l = 0; l < Lanes; ++l) {
        for (int u = 0; u < Columns; ++u) store(out + l * stride + d + u * kWidth, sum[l][u]);
    }
}

template <int Lanes>
inline void weigh_few(const float (*weights)[kFewTile], Matrix values, int64_t count, int64_t asked,
                      int64_t head_dim, const float* shrink, float* out, int64_t stride) {
    constexpr int kColumns = kWidth == 16 || Lanes == 1 ? 4 : 2;  // accumulators that fit the registers
    int64_t d = 0;
    for (; d + kColumns * kWidth <= head_dim; d += kColumns * kWidth)
        weigh_columns<Lanes, kColumns>(weights, values, count, asked, d, shrink, out, stride);
    for (; d + kWidth <= head_dim; d += kWidth)
        weigh_columns<Lanes, 1>(weights, values, count, asked, d, shrink, out, stride);
    for (; d < head_dim; ++d) {
        for (int l = 0; l < Lanes; ++l) {
            float sum = out[l * stride + d] * shrink[l];
            for (int64_t j = 0; j < count; ++j) sum += weights[l][j] * values.data[j * values.stride + d];
            out[l * stride + d] = sum;
        }
    }
}

// Fold the whole run into the state of the block's queries, given as rows [lane][D]; Lanes of them, idle ones
// included.
template <int Lanes>
inline void attend_lanes(const Problem& p, const LaneBlock& block, const float* queries, const KeyRun& run,
                         FewState& state) {
    const int64_t stride = row_stride(p.head_dim);
    alignas(64) float scores[Lanes][kFewTile];
    int64_t last = run.last;
    if (run.own) last = std::min<int64_t>(last, block.limit[block.lanes - 1]);
    Window bounds;
    const Window* window = run.slides ? &(bounds = window_of(p, block, run)) : nullptr;
    int64_t first = first_tile(window, run.first, kFewTile);
    if (window != nullptr && run.own) first = std::max(first, window->lowest);  // all lanes are of one row
    for (int64_t start = first; start < last; start += kFewTile) {
        const int64_t count = std::min(kFewTile, last - start), asked = last - start - kRowsAhead;
        const Matrix key = tile_rows(run, run.key, run.key_stride, run.key_dtype, start, count, p.head_dim,
                                     false, scratch()[kKeyTile]);
        const Matrix value = tile_rows(run, run.value, run.value_stride, run.value_dtype, start, count,
                                       p.head_dim, false, scratch()[kValueTile]);
        float shrink[Lanes];
        dot_keys<Lanes>(queries, stride, key, count, key.fresh ? asked : 0, p.head_dim, scores);
        for (int l = 0; l < Lanes; ++l) {
            const int lane = std::min(l, block.lanes - 1);
            finish_few(p, block, lane, run, window, start, count, scores[l]);
            shrink[l] = update_few(scores[l], count, state.maximum[l], state.sum[l]);
            if (p.dropout) drop_few(p, block, lane, run, start, count, scores[l]);
        }
        weigh_few<Lanes>(scores, value, count, value.fresh ? asked : 0, p.head_dim, shrink, state.out,
                         stride);
    }
}

inline void attend_few(const Problem& p, const LaneBlock& block, const float* queries, const KeyRun& run,
                       FewState& state) {
    if (block.lanes == 1) return attend_lanes<1>(p, block, queries, run, state);
    if (block.lanes == 2) return attend_lanes<2>(p, block, queries, run, state);
    attend_lanes<kFewQueries>(p, block, queries, run, state);
}

}  // namespace prefix_fast
