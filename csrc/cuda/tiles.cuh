// Tiles of rows in shared memory, and the first of the two matrix products that all kernels are made of.
//
//     scores[i][j] += Σ_d left[i][d] right[j][d]       multiply_transposed: q·kᵀ, do·vᵀ; k·qᵀ, v·doᵀ
//     sums[i][d] += Σ_j weights[i][j] right[j][d]      multiply_weights: p·v, ds·k; pᵀ·do, dsᵀ·q (sums.cuh)
//
// A warp computes 16 M rows. Its scores are float32 in the layout of mma.m16n8k16's accumulators, whatever
// computes them: lane 4 g + t has, of every 16 × 8 block, columns 2t and 2t+1 of the rows g and g + 8.
// Rows lie in shared memory an odd number of 16-byte chunks apart: eight successive rows, and eight chunks of
// one row, are in different banks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "elements.cuh"
#include "memory.cuh"
#include "mma.cuh"

namespace prefix_fast::cuda {

// A chunk as products read it: float32 is rounded to tf32 once, in shared memory, and not by every warp.
template <typename T>
__device__ inline uint4 factors_of(uint4 chunk) {
    if constexpr (std::is_same_v<T, Tf32>) {
        return {to_tf32(as_float(chunk.x)), to_tf32(as_float(chunk.y)), to_tf32(as_float(chunk.z)),
                to_tf32(as_float(chunk.w))};
    }
    return chunk;
}

// ---- the left operand: in registers, or in shared memory

// A sign for all elements: -1, 0 or 1, as bits to keep and bits to flip of a 32-bit register.
struct Sign {
    uint32_t keep, flip;
};

template <typename T>
__device__ inline Sign sign_of(float scale) {
    const uint32_t bits = kIsHalf<T> ? 0x80008000u : 0x80000000u;
    return {scale == 0 ? 0u : 0xFFFFFFFFu, scale < 0 ? bits : 0u};
}

// 16 M rows of D elements as A fragments of mma.m16n8k16.
template <typename T, int M, int D>
struct RegisterRows {
    uint32_t bits[M][D / 16][4];

    // From global memory: row[m][0] and row[m][1] are rows g and g + 8 of block m, null: zeros.
    __device__ void load(const char* const (&row)[M][2], int head_dim, Sign sign, bool is_float32 = false) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = 16 * k + i / 2 * 8;
                    const char* from = row[m][i % 2];
                    uint32_t pair = 0;
                    if (from != nullptr && column < head_dim)
                        pair = load_pair(from, column + lane_column(), is_float32);
                    bits[m][k][i] = (pair & sign.keep) ^ sign.flip;
                }
            }
        }
    }

    __device__ static uint32_t load_pair(const char* row, int column, bool is_float32) {
        if (!is_float32) return *reinterpret_cast<const uint32_t*>(row + column * 2);
        const uint2 pair = load_global_8(row + column * 4);
        return packed<T>(as_float(pair.x), as_float(pair.y));
    }

    __device__ void fragment(int m, int k, uint32_t (&a)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = bits[m][k][i];
    }
};

// 16 M rows of D elements in shared memory, this warp's from `data` on.
template <typename T, int D>
struct SharedRows {
    const Storage<T>* data;

    __device__ void fragment(int m, int k, uint32_t (&a)[4]) const {
        ldmatrix_x4(a, data + (16 * m + lane() % 16) * kPitch<T, D> + (2 * k + lane() / 16) * kChunk<T>);
    }
    __device__ const float* row(int m, int half) const {  // of float: g + 8 half of block m
        return data + (16 * m + 8 * half + lane_row()) * kPitch<T, D>;
    }
};

// kRows rows of queries into shared memory, not asynchronously, with a sign.
template <typename T, int kRows, int D, int kThreads, typename RowAt>
__device__ inline void store_rows(Storage<T>* tile, int head_dim, Sign sign, const RowAt& row_at) {
    constexpr int kChunks = D / kChunk<T>;
    for (int index = threadIdx.x; index < kRows * kChunks; index += kThreads) {
        const int row = index / kChunks, column = index % kChunks * kChunk<T>;
        const char* from = row_at(row);
        uint4 chunk{0, 0, 0, 0};
        if (from != nullptr && column < head_dim) chunk = load_global_16(from + column * sizeof(Storage<T>));
        chunk = {(chunk.x & sign.keep) ^ sign.flip, (chunk.y & sign.keep) ^ sign.flip,
                 (chunk.z & sign.keep) ^ sign.flip, (chunk.w & sign.keep) ^ sign.flip};
        store_shared_16(tile + row * kPitch<T, D> + column, factors_of<T>(chunk));
    }
}

// ---- products

template <int M, int N>
__device__ inline void fill_zero(float (&sums)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
        }
    }
}

// 16 bytes of shared memory.
struct Four {
    float at[4];
};
__device__ inline Four load_shared_four(const float* from) {
    const uint4 bits = load_shared_16(from);
    return {as_float(bits.x), as_float(bits.y), as_float(bits.z), as_float(bits.w)};
}

// Σ over four elements for the four sums of a lane, rows a0 and a1 against rows b0 and b1.
__device__ inline void add_products(float (&sum)[4], const Four& a0, const Four& a1, const Four& b0,
                                    const Four& b1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[0] += a0.at[i] * b0.at[i], sum[1] += a0.at[i] * b1.at[i];
        sum[2] += a1.at[i] * b0.at[i], sum[3] += a1.at[i] * b1.at[i];
    }
}

// sums += a · b of 16 columns in half precision, of 8 in tf32: 32 bytes of a row.
template <typename T>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kIsHalf<T>) {
        mma_m16n8k16<T>(sums, a, b);
    } else {
        mma_m16n8k8_tf32(sums, a, b);
    }
}

// scores += left · rightᵀ, right's rows 0 to 8 N - 1.
template <typename T, int M, int N, int D, typename Left>
__device__ inline void multiply_transposed(float (&scores)[M][N][4], const Left& left,
                                           const Storage<T>* right) {
    constexpr int kStride = kPitch<T, D>;
    if constexpr (!std::is_same_v<T, float>) {
        static_assert(N % 2 == 0);
        const Storage<T>* base =
            right + (lane() % 8 + lane() / 16 * 8) * kStride + lane() / 8 % 2 * kChunk<T>;
#pragma unroll
        for (int k = 0; k < D / (2 * kChunk<T>); ++k) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) left.fragment(m, k, a[m]);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, base + n * 8 * kStride + k * 2 * kChunk<T>);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply_add<T>(scores[m][n], a[m], {b[0], b[1]});
                    multiply_add<T>(scores[m][n + 1], a[m], {b[2], b[3]});
                }
            }
        }
    } else {
        const float* base = right + lane_column() * kStride;
#pragma unroll(N == 1 ? 2 : 1)
        for (int k = 0; k < D; k += 4) {
            Four a[M][2];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                a[m][0] = load_shared_four(left.row(m, 0) + k);
                a[m][1] = load_shared_four(left.row(m, 1) + k);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const Four b0 = load_shared_four(base + n * 8 * kStride + k);
                const Four b1 = load_shared_four(base + (n * 8 + 1) * kStride + k);
#pragma unroll
                for (int m = 0; m < M; ++m) add_products(scores[m][n], a[m][0], a[m][1], b0, b1);
            }
        }
    }
}

}  // namespace prefix_fast::cuda
