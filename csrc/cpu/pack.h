// Operands of the products: float32 as they are, or bfloat16 values two to an element (avx512_bf16).
//
//   [lane][D]      -> [g][D / pack][16]      queries, dO: pairs along D
//   keys [key][D]  -> in place               pairs along D are neighbours in memory
//   keys [key][D]  -> [key / pack][D]        pairs of keys, for products that sum over keys
//   P [g][key][16] -> [g][key / pack][16]    the weights beside them; rounded to bfloat16
//   P [g][key][16] -> [g][key][16 / pack]    pairs of lanes, for products that sum over lanes
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "gemm.h"
#include "keys.h"
#include "lanes.h"
#include "parallel.h"
#include "problem.h"

namespace prefix_fast {

template <class Arithmetic>
constexpr int64_t packed(int64_t count) {
    return (count + Arithmetic::kPack - 1) / Arithmetic::kPack;
}

// Whether every operand is bfloat16 and this build multiplies such pairs.
inline bool multiplies_pairs(const Problem& p) {
    const auto pairs = [](const TokenView& tensor) { return tensor.dtype == DType::kBFloat16; };
    bool all = kNativeBFloat16 && pairs(p.query) && pairs(p.key) && pairs(p.value);
    for (const SegmentSet& set : p.sets) all = all && pairs(set.key) && pairs(set.value);
    return all;
}

// f(arithmetic of the call)
template <class F>
void with_arithmetic(const Problem& p, F&& f) {
#if defined(__AVX512BF16__)
    if (multiplies_pairs(p)) return f(Pairs{});
#endif
    f(Singles{});
}

#if defined(__AVX512BF16__)
// Word i of the first 16 of one vector beside word i of another's.
alignas(64) constexpr uint16_t kInterleaved[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// Words d, d + 1, ... of a row of that many, to a vector's end; zeros past them, and for a null row.
PF_INLINE __m512i read_words(const uint16_t* row, int64_t d, int64_t count) {
    if (row == nullptr) return _mm512_setzero_si512();
    const __mmask32 present = count - d < 2 * kWidth ? (__mmask32{1} << (count - d)) - 1 : ~__mmask32{0};
    return _mm512_maskz_loadu_epi16(present, row + d);
}

// target[d] = (first[d], second[d]); a null row is zeros; zeros up to a whole vector.
inline void interleave_rows(const uint16_t* first, const uint16_t* second, int64_t head_dim, float* target) {
    const __m512i low_order = _mm512_load_si512(kInterleaved);
    const __m512i high_order = _mm512_add_epi16(low_order, _mm512_set1_epi16(16));
    for (int64_t d = 0; d < head_dim; d += 2 * kWidth) {
        const __m512i low = read_words(first, d, head_dim), high = read_words(second, d, head_dim);
        store(target + d, (Vec)_mm512_permutex2var_epi16(low, low_order, high));
        if (head_dim - d > kWidth)
            store(target + d + kWidth, (Vec)_mm512_permutex2var_epi16(low, high_order, high));
    }
}

// (a, b) of every lane, rounded to bfloat16.
PF_INLINE Vec interleave(Vec a, Vec b) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    return (Vec)_mm512_maskz_permutexvar_epi16(0xFFFFFFFF, _mm512_load_si512(kOrder), halves);
}

// Rows of a tile as they are, where pairs along D are whole elements; else copied, zeros for masked keys.
inline Matrix tile_rows(Pairs, const KeyRun& run, const char* data, int64_t stride, DType, int64_t start,
                        int64_t count, int64_t head_dim, bool reused, Buffer& buffer) {
    const char* source = data + start * stride;
    const bool whole = stride % 4 == 0 && head_dim % 2 == 0;
    if (whole && run.mask == nullptr && !(reused && stride >= kScatteredRows)) {
        return {reinterpret_cast<const float*>(source), stride / 4, true};
    }
    const int64_t target_stride = row_stride(packed<Pairs>(head_dim));
    float* target = buffer.floats(count * target_stride);
    for (int64_t j = 0; j < count; ++j, source += stride) {
        float* row = target + j * target_stride;
        row[packed<Pairs>(head_dim) - 1] = 0.0f;
        const size_t bytes = 2 * static_cast<size_t>(head_dim);
        run.visible(start + j) ? std::memcpy(row, source, bytes) : std::memset(row, 0, bytes);
    }
    return {target, target_stride};
}

// [key / 2][D] pairs of keys; zeros for masked ones and past the count.
inline Matrix tile_columns(Pairs, const KeyRun& run, const char* data, int64_t stride, DType, int64_t start,
                           int64_t count, int64_t head_dim, bool, Buffer& buffer, Matrix = {nullptr, 0}) {
    const int64_t target_stride = row_stride(head_dim);
    float* target = buffer.floats(packed<Pairs>(count) * target_stride);
    const auto row = [&](int64_t j) {
        const bool present = j < count && run.visible(start + j);
        return present ? reinterpret_cast<const uint16_t*>(data + (start + j) * stride) : nullptr;
    };
    for (int64_t j = 0; j < count; j += 2) {
        interleave_rows(row(j), row(j + 1), head_dim, target + j / 2 * target_stride);
    }
    return {target, target_stride};
}

// Own values come from far memory, and are interleaved faster than they come; a segment's are near.
inline void prefetch_values(Pairs, const KeyRun& run, const KeyTile& tile, int64_t head_dim) {
    if (!run.own) return;
    const char* row = run.value + tile.start * run.value_stride;
    for (int64_t j = 0; j < tile.count; ++j, row += run.value_stride)
        prefetch_row(reinterpret_cast<const float*>(row), packed<Pairs>(head_dim));
}

// target[key / 2][16] = the weights of keys 0, 1, ...; target may be where they are read from
template <class Weight>
PF_INLINE void write_by_keys(Pairs, int64_t keys, float* target, Weight&& weight) {
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
        const Vec first = weight(j), second = weight(j + 1);
        store(target + j / 2 * kGroup, interleave(first, second));
    }
    if (j < keys) store(target + j / 2 * kGroup, interleave(weight(j), Vec{}));
}

// target[key][16 / 2] = the weights of one key
PF_INLINE void write_by_lanes(Pairs, int64_t key, float* target, Vec weight) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)weight);
    std::memcpy(target + key * (kGroup / 2), &half, sizeof(half));
}

// The block's rows of a bfloat16 tensor, unscaled; zeros in idle lanes.
inline void read_lanes(Pairs, const TokenView& tensor, const LaneBlock& block, int64_t head_dim, float,
                       float* rows) {
    const int64_t stride = row_stride(packed<Pairs>(head_dim));
    for (int lane = 0; lane < block.groups * kGroup; ++lane) {
        const char* source =
            lane < block.lanes ? tensor.at(block.row[lane], block.head[lane], block.query[lane]) : nullptr;
        for (int64_t d = 0; d < head_dim; d += 2 * kWidth) {
            store(rows + lane * stride + d / 2,
                  (Vec)read_words(reinterpret_cast<const uint16_t*>(source), d, head_dim));
        }
    }
}

// [lane][D] as read -> [lane / 2][D] pairs of lanes
inline const float* pack_rows(Pairs, const LaneBlock& block, int64_t head_dim, const float* rows,
                              Buffer& buffer) {
    const int64_t stride = row_stride(packed<Pairs>(head_dim)), target_stride = row_stride(head_dim);
    float* pairs = buffer.floats(kLanes / 2 * target_stride);
    for (int lane = 0; lane < block.groups * kGroup; lane += 2) {
        float* target = pairs + lane / 2 * target_stride;
        std::memset(target, 0, static_cast<size_t>(round_up(head_dim, kGroup)) * sizeof(float));
        interleave_rows(reinterpret_cast<const uint16_t*>(rows + lane * stride),
                        reinterpret_cast<const uint16_t*>(rows + (lane + 1) * stride), head_dim, target);
    }
    return pairs;
}

// Queries stay as they are: their scale goes to the scores, and to dS.
inline AssignScaled write_scores(Pairs, const Problem& p) {
    return {p.scale * kLog2E};
}
#endif

inline Matrix tile_rows(Singles, const KeyRun& run, const char* data, int64_t stride, DType dtype,
                        int64_t start, int64_t count, int64_t head_dim, bool reused, Buffer& buffer) {
    return tile_rows(run, data, stride, dtype, start, count, head_dim, reused, buffer);
}

// The tile's rows for a product that sums over keys: `rows`, where the caller has them already.
inline Matrix tile_columns(Singles, const KeyRun& run, const char* data, int64_t stride, DType dtype,
                           int64_t start, int64_t count, int64_t head_dim, bool reused, Buffer& buffer,
                           Matrix rows = {nullptr, 0}) {
    if (rows.data != nullptr) return rows;
    return tile_rows(run, data, stride, dtype, start, count, head_dim, reused, buffer);
}

inline void prefetch_values(Singles, const KeyRun&, const KeyTile&, int64_t) {}

template <class Weight>
PF_INLINE void write_by_keys(Singles, int64_t keys, float* target, Weight&& weight) {
    for (int64_t j = 0; j < keys; ++j) store(target + j * kGroup, weight(j));
}

PF_INLINE void write_by_lanes(Singles, int64_t key, float* target, Vec weight) {
    store(target + key * kGroup, weight);
}

inline void read_lanes(Singles, const TokenView& tensor, const LaneBlock& block, int64_t head_dim,
                       float factor, float* rows) {
    read_lanes(tensor, block, head_dim, factor, rows);
}

inline const float* pack_rows(Singles, const LaneBlock&, int64_t, const float* rows, Buffer&) {
    return rows;
}

inline Assign write_scores(Singles, const Problem&) {
    return {};
}

}  // namespace prefix_fast
