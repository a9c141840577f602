// The second matrix product, and how its sums are stored.
//
//     sums[i][d] += Σ_j weights[i][j] right[j][d]      multiply_weights: p·v, ds·k; pᵀ·do, dsᵀ·q
//
// Weights are scores, in registers as tiles.cuh says, and the sums are laid out like them, but where the
// columns' order makes loads cheaper:
//
//     float32    a lane has columns 8t to 8t+7 of every 32, so that a load serves four
//     tf32       `add_gradients` computes the sums of columns as rows: what a lane loads at once is then of
//                one product, and serves all rows of the warp. Sums with a factor of each row, as those of
//                the softmax, are not transposed.
#pragma once

#include "tiles.cuh"

namespace prefix_fast::cuda {

// sums += weights · right, right's rows 0 to 8 K - 1. The weights are rounded to T.
template <typename T, int M, int K, int D>
__device__ inline void multiply_weights(float (&sums)[M][D / 8][4], const float (&weights)[M][K][4],
                                        const Storage<T>* right) {
    constexpr int kStride = kPitch<T, D>;
    if constexpr (kIsHalf<T>) {
        static_assert(K % 2 == 0 && D % 16 == 0);
        const Storage<T>* base = right + lane() % 16 * kStride + lane() / 16 * 8;
#pragma unroll
        for (int k = 0; k < K; k += 2) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float (&w)[4] = weights[m][k + i / 2];
                    a[m][i] = packed<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, base + k * 8 * kStride + n * 8);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma_m16n8k16<T>(sums[m][n], a[m], {b[0], b[1]});
                    mma_m16n8k16<T>(sums[m][n + 1], a[m], {b[2], b[3]});
                }
            }
        }
    } else if constexpr (std::is_same_v<T, Tf32>) {
        const float* base = right + lane_column() * kStride + lane_row();
#pragma unroll
        for (int k = 0; k < K; ++k) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[m][i] = to_tf32(weights[m][k][i % 2 * 2 + i / 2]);
            }
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float* place = base + k * 8 * kStride + n * 8;
                const uint32_t b[2] = {__float_as_uint(place[0]), __float_as_uint(place[kStride])};
#pragma unroll
                for (int m = 0; m < M; ++m) mma_m16n8k8_tf32(sums[m][n], a[m], b);
            }
        }
    } else {
        const float* base = right + 4 * lane_column();
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {  // column j of the block is with lane j / 2 of the four
                float a[M][2];
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    a[m][0] = __shfl_sync(0xFFFFFFFFu, weights[m][k][j % 2], j / 2, 4);
                    a[m][1] = __shfl_sync(0xFFFFFFFFu, weights[m][k][j % 2 + 2], j / 2, 4);
                }
#pragma unroll
                for (int n = 0; n < D / 8; n += 4) {
                    const float* place = base + (k * 8 + j) * kStride + n * 8;
                    const Four low = load_shared_four(place);
                    const Four high = load_shared_four(place + 4);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
#pragma unroll
                        for (int m = 0; m < M; ++m) {
                            float (&sum)[4] = sums[m][n + i];
                            sum[0] += a[m][0] * low.at[i], sum[1] += a[m][0] * high.at[i];
                            sum[2] += a[m][1] * low.at[i], sum[3] += a[m][1] * high.at[i];
                        }
                    }
                }
            }
        }
    }
}

// sums += leftᵀ · right, left's rows 0 to 8 K - 1 in shared memory, kLeftPitch apart, its columns this warp's
// 16 rows.
template <typename T, int K, int D, int kLeftPitch>
__device__ inline void multiply_stored(float (&sums)[D / 8][4], const Storage<T>* left,
                                       const Storage<T>* right) {
    static_assert(kIsHalf<T> && K % 2 == 0);
    const Storage<T>* row = left + (lane() % 8 + lane() / 16 * 8) * kLeftPitch + lane() / 8 % 2 * 8;
    const Storage<T>* base = right + lane() % 16 * kPitch<T, D> + lane() / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 2) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, row + k * 8 * kLeftPitch);
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, base + k * 8 * kPitch<T, D> + n * 8);
            mma_m16n8k16<T>(sums[n], a, {b[0], b[1]});
            mma_m16n8k16<T>(sums[n + 1], a, {b[2], b[3]});
        }
    }
}

// The same sums, of gradients: `for_each_gradient_row` knows where they are.
//
// In tf32 columns are rows of the product: of every 16, row g is column 2g, and g + 8 is 2g + 1. The order of
// its eight terms is free too: slots t and t + 4 are rows 2t and 2t + 1 of `right`, as the weights lie.
template <typename T, int M, int K, int D>
__device__ inline void add_gradients(float (&sums)[M][D / 8][4], const float (&weights)[M][K][4],
                                     const Storage<T>* right) {
    if constexpr (std::is_same_v<T, Tf32>) {
        constexpr int kStride = kPitch<T, D>;
        const float* base = right + lane_column() * kStride + 2 * lane_row();
#pragma unroll
        for (int k = 0; k < K; ++k) {
            uint32_t b[M][2][2];  // of rows 8 half to 8 half + 7
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) b[m][i / 2][i % 2] = to_tf32(weights[m][k][i]);
            }
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                const float* place = base + k * 8 * kStride + n * 8;
                const uint2 even = load_shared_8(place), odd = load_shared_8(place + kStride);
                const uint32_t a[4] = {even.x, even.y, odd.x, odd.y};
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma_m16n8k8_tf32(sums[m][n], a, b[m][0]);
                    mma_m16n8k8_tf32(sums[m][n + 1], a, b[m][1]);
                }
            }
        }
    } else {
        multiply_weights<T, M, K, D>(sums, weights, right);
    }
}

// use(column, values) for what a lane has of row g + 8 half of its warp's sums: two neighbouring columns at a
// time, or four.
template <typename T, int D, typename Use>
__device__ inline void for_each_columns(const float (&sums)[D / 8][4], int half, const Use& use) {
    if constexpr (!std::is_same_v<T, float>) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            use(8 * n + lane_column(), float2{sums[n][2 * half], sums[n][2 * half + 1]});
        }
    } else {
#pragma unroll
        for (int n = 0; n < D / 8; n += 4) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int i = 2 * half + c;
                use(8 * n + 4 * (lane_column() + c),
                    float4{sums[n][i], sums[n + 1][i], sums[n + 2][i], sums[n + 3][i]});
            }
        }
    }
}

__device__ inline float2 scaled(float2 values, float factor) {
    return {values.x * factor, values.y * factor};
}
__device__ inline float4 scaled(float4 values, float factor) {
    return {values.x * factor, values.y * factor, values.z * factor, values.w * factor};
}

__device__ inline uint2 bits_of(float2 values) {
    return {__float_as_uint(values.x), __float_as_uint(values.y)};
}
__device__ inline uint4 bits_of(float4 values) {
    return {__float_as_uint(values.x), __float_as_uint(values.y), __float_as_uint(values.z),
            __float_as_uint(values.w)};
}

// Neighbouring columns of a row, rounded to the tensor's type.
template <typename S>
__device__ inline void store_columns(char* row, int column, float2 values) {
    if constexpr (sizeof(S) == 2) {
        *reinterpret_cast<uint32_t*>(row + column * 2) = packed<S>(values.x, values.y);
    } else {
        store_global_8(row + column * 4, bits_of(values));
    }
}
template <typename S>
__device__ inline void store_columns(char* row, int column, float4 values) {
    static_assert(sizeof(S) == 4);
    store_global_16(row + column * 4, bits_of(values));
}

// use(place, columns) for each of the warp's 16 M rows of which this lane has sums of gradients;
// columns(each) calls each(column, values) as above.
template <typename T, int M, int D, typename Use>
__device__ inline void for_each_gradient_row(const float (&sums)[M][D / 8][4], const Use& use) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
        if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i / 2, c = i % 2;
                use(16 * m + 8 * half + lane_column() + c, [&](const auto& each) {
#pragma unroll
                    for (int n = 0; n < D / 8; n += 2) {
                        const float (&pair)[4] = sums[m][n + half];
                        each(8 * n + 2 * lane_row(), float2{pair[c], pair[2 + c]});
                    }
                });
            }
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                use(16 * m + 8 * half + lane_row(),
                    [&](const auto& each) { for_each_columns<T, D>(sums[m], half, each); });
            }
        }
    }
}

// Columns of a row, as the functions above have them, times a factor.
template <typename S, typename Columns>
__device__ inline void store_row(char* row, int head_dim, float factor, const Columns& columns) {
    columns([&](int column, auto values) {
        if (column < head_dim) store_columns<S>(row, column, scaled(values, factor));
    });
}

// One element of a row, by the tensor's dtype (call.h).
__device__ inline void write_float(char* row, int column, float value, int64_t dtype) {
    if (dtype == kFloat32) {
        reinterpret_cast<float*>(row)[column] = value;
    } else if (dtype == kBFloat16) {
        reinterpret_cast<__nv_bfloat16*>(row)[column] = __float2bfloat16(value);
    } else {
        reinterpret_cast<__half*>(row)[column] = __float2half(value);
    }
}

}  // namespace prefix_fast::cuda
