// From the products of a tile to its logits: softcap, bias, masks, in this order. Log2 units throughout.
//
//   s <- c tanh(s / c)        s <- s + bias        s <- -inf where the key is hidden from the query
#pragma once

#include <algorithm>
#include <cstdint>

#include "half.h"
#include "keys.h"
#include "lanes.h"
#include "problem.h"
#include "simd.h"
#include "window.h"

namespace prefix_fast {

// 2^x - 1 and 2^x for x <= 0, the relative error of either below 2e-7: the difference of the two would lose
// it near x = 0. -1 and 0 from -127 down, NaN at NaN.
//
// x = n + f as in simd.h; 2^n (2^f - 1) + (2^n - 1) with a degree-5 minimax polynomial for (2^f - 1) / f.
PF_INLINE Vec exp2_minus_one(Vec x, Vec& whole) {
    const Vec magic = broadcast(12582912.0f);
    const Vec clamped = max(broadcast(-127.0f), x);
    const Vec shifted = clamped + magic;
    const Vec f = clamped - (shifted - magic);
    const Vec power = (Vec)(((VecI)shifted << 23) + broadcast_int(127 << 23));
    Vec poly = broadcast(0.00015403512225020677f);
    poly = fma(poly, f, broadcast(0.0013390735257416964f));
    poly = fma(poly, f, broadcast(0.009618237614631653f));
    poly = fma(poly, f, broadcast(0.05550357326865196f));
    poly = fma(poly, f, broadcast(0.24022649228572845f));
    poly = fma(poly, f, broadcast(0.6931471824645996f));
    const Vec part = poly * f;
    whole = fma(power, part, power);
    return fma(power, part, power - broadcast(1.0f));
}

// c tanh(s / c) = c sign(s) (1 - w) / (1 + w) with w = e^(-2 |s| / c), and its slope (1 + tanh) (1 - tanh),
// where 1 - tanh = 2 w / (1 + w) keeps its digits as tanh comes near 1.
struct Softcap {
    Vec cap, steepness;

    explicit Softcap(float softcap)
        : cap(broadcast(softcap * kLog2E)), steepness(broadcast(static_cast<float>(2.0 / softcap))) {}

    PF_INLINE Vec operator()(Vec score, Vec& slope) const {
        const VecI sign = broadcast_int(INT32_MIN);
        const Vec one = broadcast(1.0f);
        Vec whole;
        const Vec less = exp2_minus_one((Vec)((VecI)score | sign) * steepness, whole);
        const Vec inverse = one / (broadcast(2.0f) + less), tanh = -less * inverse;
        slope = (one + tanh) * (whole + whole) * inverse;
        return (Vec)((VecI)(cap * tanh) | ((VecI)score & sign));
    }
};

// Slopes (null: not wanted) lie as the scores do.
inline void cap_scores(float softcap, const LaneBlock& block, const KeyTile& tile, float* scores,
                       int64_t step, float* slopes) {
    const Softcap capped(softcap);
    for (int g = 0; g < block.groups; ++g) {
        for (int64_t at = g * step; at < g * step + tile.needed[g] * kGroup; at += kWidth) {
            Vec slope;
            store(scores + at, capped(load(scores + at), slope));
            if (slopes != nullptr) store(slopes + at, slope);
        }
    }
}

// P <- P (1 - tanh^2): what a gradient of the logits is multiplied by is then one of the products.
inline void apply_slopes(const LaneBlock& block, const KeyTile& tile, const float* slopes, int64_t step,
                         float* weights) {
    for (int g = 0; g < block.groups; ++g) {
        for (int64_t at = g * step; at < g * step + tile.needed[g] * kGroup; at += kWidth)
            store(weights + at, load(weights + at) * load(slopes + at));
    }
}

// The biases of `count` keys, at most a vector of them, from `source` on.
PF_INLINE Vec read_biases(const BiasView& bias, const char* source, int64_t count) {
    const int64_t bytes = bias.dtype == DType::kFloat32 ? 4 : 2;
    if (bias.key == bytes && count == kWidth) return in_log2(load_row(source, bias.dtype));
    alignas(64) float row[kWidth] = {};
    for (int64_t j = 0; j < count; ++j) row[j] = read_element(source + j * bias.key, bias.dtype);
    return in_log2(load(row));
}

// Rows of biases meet columns of scores: squares are transposed.
inline void add_bias(const BiasView& bias, const LaneBlock& block, const KeyTile& tile, float* scores,
                     int64_t step) {
    for (int lane = 0; lane < block.groups * kGroup; lane += kWidth) {
        const char* row[kWidth];
        for (int i = 0; i < kWidth; ++i) {
            const int from = std::min(lane + i, block.lanes - 1);  // idle lanes read what nobody uses
            row[i] = bias.at(block.row[from], block.head[from], block.query[from], tile.start);
        }
        float* column = scores + lane / kGroup * step + lane % kGroup;
        const int64_t needed = tile.needed[lane / kGroup];
        for (int64_t j = 0; j < needed; j += kWidth) {
            const int64_t count = std::min<int64_t>(kWidth, needed - j);
            Vec square[kWidth];
            for (int i = 0; i < kWidth; ++i) square[i] = read_biases(bias, row[i] + j * bias.key, count);
            transpose_stage<kWidth / 2>(square);
            for (int64_t k = 0; k < count; ++k) {
                float* at = column + (j + k) * kGroup;
                store(at, load(at) + square[k]);
            }
        }
    }
}

// -inf where !visible(key, lanes of the vector), for keys [first, last) of a group.
template <class Visible>
PF_INLINE void hide(const KeyTile& tile, int64_t first, int64_t last, float* scores, Visible&& visible) {
    const Vec hidden = broadcast(-kInf);
    for (int64_t j = first; j < last; ++j) {
        const VecI key = broadcast_int(static_cast<int32_t>(tile.start + j));
        for (int v = 0; v < kGroup; v += kWidth) {
            float* at = scores + j * kGroup + v;
            store(at, select(visible(key, v), load(at), hidden));
        }
    }
}

// Above the causal bound, before the window, masked. Tiles that a bound does not cut are left alone.
inline void mask_scores(const LaneBlock& block, const KeyRun& run, const Window* window, const KeyTile& tile,
                        float* scores, int64_t step) {
    for (int g = 0; g < block.groups; ++g) {
        float* group = scores + g * step;
        if (run.own) {
            const int32_t* limit = block.limit + g * kGroup;
            const int64_t first = std::max<int64_t>(block.group_low[g] - tile.start, 0);
            hide(tile, first, tile.needed[g], group,
                 [&](VecI key, int v) { return load_int(limit + v) > key; });
        }
        if (window != nullptr) {
            const int32_t* floor = window->floor + g * kGroup;
            const int64_t last = std::min(window->group_highest[g] - tile.start, tile.needed[g]);
            hide(tile, 0, last, group, [&](VecI key, int v) { return key >= load_int(floor + v); });
        }
        if (run.mask == nullptr) continue;
        for (int64_t j = 0; j < tile.needed[g]; ++j) {
            if (run.visible(tile.start + j)) continue;
            for (int v = 0; v < kGroup; v += kWidth) store(group + j * kGroup + v, broadcast(-kInf));
        }
    }
}

inline void finish_scores(const Problem& p, const LaneBlock& block, const KeyRun& run, const Window* window,
                          const KeyTile& tile, float* scores, int64_t step, float* slopes = nullptr) {
    if (p.softcap > 0.0f) cap_scores(p.softcap, block, tile, scores, step, slopes);
    if (run.bias) add_bias(run.bias, block, tile, scores, step);
    if (run.own || window != nullptr) mask_scores(block, run, window, tile, scores, step);
}

}  // namespace prefix_fast
