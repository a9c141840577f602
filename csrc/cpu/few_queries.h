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

namespace prefix_fast {

constexpr int kFewQueries = 4;
constexpr int64_t kFewTile = 128;  // keys

struct FewState {
    float maximum[kGroup];  // of whole vectors
    float sum[kGroup];
    float* out = nullptr;  // [lane][D]
};

// s[j] = q . k_j, kWidth keys at a time: the partial sums of kWidth keys are transposed and added.
inline void dot_keys(const float* query, Matrix keys, int64_t count, int64_t head_dim, float* scores) {
    const int64_t whole = head_dim / kWidth * kWidth;
    for (int64_t start = 0; start < count; start += kWidth) {
        Vec part[kWidth];
        float tail[kWidth];
        for (int u = 0; u < kWidth; ++u) {
            const float* key = keys.data + std::min(start + u, count - 1) * keys.stride;
            Vec sum{};
            for (int64_t d = 0; d < whole; d += kWidth) sum = fma(load(query + d), load(key + d), sum);
            part[u] = sum;
            tail[u] = 0.0f;
            for (int64_t d = whole; d < head_dim; ++d) tail[u] += query[d] * key[d];
        }
        transpose_stage<kWidth / 2>(part);
        Vec total = load(tail);
        for (int half = kWidth / 2; half > 0; half /= 2) {
            for (int u = 0; u < half; ++u) part[u] += part[u + half];
        }
        store(scores + start, part[0] + total);
    }
}

inline void mask_few(const Problem& p, const LaneBlock& block, int lane, const KeyRun& run, int64_t start,
                     int64_t count, float* scores) {
    if (!run.own) return;
    const char* bias = p.bias == nullptr
                           ? nullptr
                           : p.bias + block.row[lane] * p.bias_row + block.head[lane] * p.bias_head +
                                 block.query[lane] * p.bias_query + start * p.bias_key;
    for (int64_t j = 0; j < count; ++j) {
        if (bias != nullptr) scores[j] += read_bias(p, bias + j * p.bias_key);
        if (start + j >= block.limit[lane] || !run.visible(start + j)) scores[j] = -kInf;
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

// O[d] = O[d] shrink + sum_j p_j v_j[d]
inline void weigh_few(const float* weights, Matrix values, int64_t count, int64_t head_dim, float shrink,
                      float* out) {
    constexpr int kUnroll = 4;
    int64_t d = 0;
    for (; d + kUnroll * kWidth <= head_dim; d += kUnroll * kWidth) {
        Vec sum[kUnroll];
        for (int u = 0; u < kUnroll; ++u) sum[u] = load(out + d + u * kWidth) * broadcast(shrink);
        const float* value = values.data + d;
        for (int64_t j = 0; j < count; ++j, value += values.stride) {
            const Vec weight = broadcast(weights[j]);
            for (int u = 0; u < kUnroll; ++u) sum[u] = fma(weight, load(value + u * kWidth), sum[u]);
        }
        for (int u = 0; u < kUnroll; ++u) store(out + d + u * kWidth, sum[u]);
    }
    for (; d + kWidth <= head_dim; d += kWidth) {
        Vec sum = load(out + d) * broadcast(shrink);
        for (int64_t j = 0; j < count; ++j) {
            sum = fma(broadcast(weights[j]), load(values.data + j * values.stride + d), sum);
        }
        store(out + d, sum);
    }
    for (; d < head_dim; ++d) {
        float sum = out[d] * shrink;
        for (int64_t j = 0; j < count; ++j) sum += weights[j] * values.data[j * values.stride + d];
        out[d] = sum;
    }
}

// Fold the whole run into the state of the block's (at most four) queries, given as rows [lane][D].
inline void attend_few(const Problem& p, const LaneBlock& block, const float* queries, const KeyRun& run,
                       FewState& state) {
    const int64_t stride = row_stride(p.head_dim);
    alignas(64) float scores[kFewTile];
    int64_t last = run.last;
    if (run.own) last = std::min<int64_t>(last, block.limit[block.lanes - 1]);
    for (int64_t start = run.first; start < last; start += kFewTile) {
        const int64_t count = std::min(kFewTile, last - start);
        const Matrix key = tile_rows(run, run.key, run.key_stride, run.key_dtype, start, count, p.head_dim,
                                     false, scratch()[kKeyTile]);
        const Matrix value = tile_rows(run, run.value, run.value_stride, run.value_dtype, start, count,
                                       p.head_dim, false, scratch()[kValueTile]);
        for (int lane = 0; lane < block.lanes; ++lane) {
            dot_keys(queries + lane * stride, key, count, p.head_dim, scores);
            mask_few(p, block, lane, run, start, count, scores);
            const float shrink = update_few(scores, count, state.maximum[lane], state.sum[lane]);
            if (p.dropout) drop_few(p, block, lane, run, start, count, scores);
            weigh_few(scores, value, count, p.head_dim, shrink, state.out + lane * stride);
        }
    }
}

}  // namespace prefix_fast
