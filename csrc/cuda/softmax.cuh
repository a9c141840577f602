// Scores, masks, dropout and the online softmax on a warp's 16 M rows of queries by 8 N keys.
//
//     s_ij = scale · q_i·k_j (softcapped, plus bias, -inf where hidden)      p_ij = e^{s_ij - lse_i}
//
// Two variants: plain scores stay products q·k, and the exponential scales them in the FMA that it needs
// anyway, to base 2; with options (softcap, bias, dropout) they are natural logits, since the largest biases
// times log2 e would overflow. What a tile needs is asked once for the tile, and tiles in which all keys are
// seen by all queries have no mask. A query that has seen no key keeps the maximum -inf and takes exponents
// relative to 0: -inf minus -inf is NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "segments.cuh"
#include "sums.cuh"

namespace prefix_fast::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Where this thread's rows stand: g and g + 8 of every block of 16.
template <int M>
struct Rows {
    int row[M][2], head[M][2];
    int token[M][2];     // query of its row
    int position[M][2];  // among the own tokens, for a set that begins at position 0
};

// A tile of keys of one set.
struct KeyTile {
    int set, start, valid;
    int begin;            // position of the set's first key
    bool causal, slides;  // what can hide a key from some queries
    KeyMask mask;
};

__device__ inline float infinity() {
    return __int_as_float(0x7F800000);
}

__device__ inline float read_float(const void* data, int64_t place, int64_t dtype) {
    if (dtype == kFloat32) return static_cast<const float*>(data)[place];
    if (dtype == kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[place]);
    return __half2float(static_cast<const __half*>(data)[place]);
}

// To a few units in the last place, near zero too (Cephes tanhf).
__device__ inline float tanh_of(float x) {
    const float z = x * x, magnitude = fabsf(x);
    float near = -5.70498872745e-3f * z + 2.06390887954e-2f;
    near = near * z - 5.37397155531e-2f;
    near = near * z + 1.33314422036e-1f;
    near = near * z - 3.33332819422e-1f;
    near = near * z * x + x;
    const float far = 1 - __fdividef(2, exp2_approx(2 * kLog2e * magnitude) + 1);
    return magnitude < 0.625f ? near : copysignf(far, x);
}

// ---- scores

// What products are multiplied by to be exponents of base 2 (plain), or of e (with options).
template <bool kOptions>
__device__ inline float unit_of(float scale) {
    return kOptions ? scale : scale * kLog2e;
}

// 2^(score · unit - level) of plain scores, e^(score - level) of natural logits.
template <bool kOptions>
__device__ inline float exponential(float score, float unit, float level) {
    if (kOptions) return exp2_approx((score - level) * kLog2e);
    return exp2_approx(fmaf(score, unit, -level));
}

// Natural logits from products, in place: scale and softcap, whose derivative is left in `slopes`.
template <int N>
__device__ inline void apply_softcap(float (&scores)[N][4], float (&slopes)[N][4], float scale,
                                     float softcap) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float bounded = tanh_of(scores[n][i] * (scale / softcap));
            slopes[n][i] = 1 - bounded * bounded;
            scores[n][i] = softcap * bounded;
        }
    }
}

template <int N>
__device__ inline void apply_scale(float (&scores)[N][4], float scale) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= scale;
    }
}

// An element of a bias of kBytes, float32 or one of the two halves.
template <int kBytes_>
struct BiasElement {
    static constexpr int kBytes = kBytes_;
    bool is_bfloat16;

    __device__ float operator()(const char* at) const {
        if constexpr (kBytes == 4) return *reinterpret_cast<const float*>(at);
        const __half value = *reinterpret_cast<const __half*>(at);
        return is_bfloat16 ? as_float(uint32_t{__half_as_ushort(value)} << 16) : __half2float(value);
    }
};

// use(element): the size is asked for once, so that loads can overlap.
template <typename Use>
__device__ inline void with_bias(const Bias& bias, const Use& use) {
    if (bias.dtype == kFloat32) {
        use(BiasElement<4>{false});
    } else {
        use(BiasElement<2>{bias.dtype == kBFloat16});
    }
}

// Adds the bias of rows of queries and columns of keys. Keys past the last have none.
template <int M, int N>
__device__ inline void add_bias(float (&scores)[M][N][4], const Bias& bias, const Rows<M>& rows,
                                const KeyTile& tile) {
    with_bias(bias, [&](const auto& element) {
        const int first = tile.start + lane_column();
        const int64_t step = bias.key * element.kBytes;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const char* at = static_cast<const char*>(bias.data) + first * step +
                                 (rows.row[m][half] * bias.row + rows.head[m][half] * bias.head +
                                  rows.token[m][half] * bias.query) *
                                     element.kBytes;
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        if (first + 8 * n + c < tile.valid) scores[m][n][2 * half + c] += element(at);
                        at += (c == 0 ? 1 : 7) * step;
                    }
                }
            }
        }
    });
}

// Logits of a tile, in place. Returns nothing of the softcap's slope, which only the backward pass needs.
template <int M, int N>
__device__ inline void natural_logits(float (&scores)[M][N][4], const Call& call, const Bias& bias,
                                      const Rows<M>& rows, const KeyTile& tile, float scale) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
        if (call.softcap != 0) {
            float slopes[N][4];
            apply_softcap(scores[m], slopes, scale, call.softcap);
        } else {
            apply_scale(scores[m], scale);
        }
    }
    if (bias.data != nullptr) add_bias(scores, bias, rows, tile);
}

// `hidden` in place of what a query does not see: keys that do not exist, are masked, come later or left the
// window.
template <int M, int N>
__device__ inline void hide(float (&scores)[M][N][4], float hidden, const Rows<M>& rows, const KeyTile& tile,
                            int window) {
    const int column = tile.start + lane_column();
    uint32_t present = 0;  // bits of this lane's columns
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int key = column + 8 * n + c;
            if (key < tile.valid && !tile.mask.hides(key)) present |= 1u << (2 * n + c);
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = rows.position[m][half] - tile.begin;
            const int last = tile.causal ? position : 0x7FFFFFFF;
            const int first = tile.slides ? position - window + 1 : -0x7FFFFFFF;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int key = column + 8 * n + c;
                    const bool seen = (present >> (2 * n + c) & 1) && key <= last && key >= first;
                    if (!seen) scores[m][n][2 * half + c] = hidden;
                }
            }
        }
    }
}

// ---- the softmax

// The largest, and the sum, over the four lanes that share a row.
__device__ inline float maximum_of_row(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 2));
}
__device__ inline float sum_of_row(float value) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
    return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}

// Maximum and sum of weights of each of a thread's rows; the sum is over this lane's columns alone until the
// end.
template <int M>
struct State {
    float maximum[M][2], total[M][2];

    __device__ void clear() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) maximum[m][half] = -infinity(), total[m][half] = 0;
        }
    }
};

// Scores become weights relative to the new maximum, and `sums` are rescaled to it. unit > 0.
template <bool kOptions, int M, int N, int K>
__device__ inline void online_softmax_update(float (&scores)[M][N][4], float unit, State<M>& state,
                                             float (&sums)[M][K][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = scores[m][0][2 * half];
#pragma unroll
            for (int n = 0; n < N; ++n) {
                largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
            }
            largest = maximum_of_row(largest);
            const float old = state.maximum[m][half];
            const float now = fmaxf(old, kOptions ? largest : largest * unit);
            const float reference = now == -infinity() ? 0 : now;
            const float factor =
                kOptions ? exp2_approx((old - reference) * kLog2e) : exp2_approx(old - reference);
            float total = 0;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& score = scores[m][n][2 * half + c];
                    score = exponential<kOptions>(score, unit, reference);
                    total += score;
                }
            }
            state.maximum[m][half] = now;
            state.total[m][half] = state.total[m][half] * factor + total;
#pragma unroll
            for (int k = 0; k < K; ++k) sums[m][k][2 * half] *= factor, sums[m][k][2 * half + 1] *= factor;
        }
    }
}

// The state of one row after one more logit that has no value, and what its sums are divided by; sinks alone
// make no distribution. `maximum` is natural with kOptions, else of base 2.
struct Normal {
    float lse;      // natural
    float inverse;  // 0 where no key was seen
};

template <bool kOptions>
__device__ inline Normal normal_of(float maximum, float total, bool has_sink, float sink, float kept_share) {
    if (total == 0) return {-infinity(), 0};
    float factor = 1;
    if (has_sink) {
        const float logit = kOptions ? sink : sink * kLog2e;
        const float now = fmaxf(maximum, logit), to_base_2 = kOptions ? kLog2e : 1;
        factor = exp2_approx((maximum - now) * to_base_2);
        total = total * factor + exp2_approx((logit - now) * to_base_2);
        maximum = now;
    }
    return {(kOptions ? maximum : maximum * kLn2) + logf(total), factor / (total * kept_share)};
}

// ---- dropout

struct Words {
    uint32_t w[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"). A block serves four keys:
// counter (query, key / 4, row · H + head, set), word key % 4.
__device__ inline Words philox(uint64_t seed, uint32_t query, uint32_t key_group, uint32_t stream,
                               uint32_t set) {
    uint32_t c0 = query, c1 = key_group, c2 = stream, c3 = set;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll 1
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Calls use(n, half, column, kept) for this lane's weights of one block of rows of queries; starts are
// multiples of 8.
//
// A block of four keys lies with two lanes, which both have rows g and g + 8: each draws for one row and they
// exchange.
template <int N, typename Use>
__device__ inline void for_each_kept(const Call& call, const int (&row)[2], const int (&head)[2],
                                     const int (&token)[2], const KeyTile& tile, const Use& use) {
    const bool odd = lane() & 1;
    const uint64_t seed = *call.seed;
    const uint32_t stream = (odd ? row[1] : row[0]) * call.heads + (odd ? head[1] : head[0]);
    const uint32_t query = odd ? token[1] : token[0];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const uint32_t group = (tile.start + 8 * n + lane_column()) / 4;
        const Words mine = philox(seed, query, group, stream, tile.set);
        const uint32_t first = __shfl_xor_sync(0xFFFFFFFFu, odd ? mine.w[0] : mine.w[2], 1);
        const uint32_t second = __shfl_xor_sync(0xFFFFFFFFu, odd ? mine.w[1] : mine.w[3], 1);
        use(n, 0, 0, (odd ? first : mine.w[0]) >= call.threshold);
        use(n, 0, 1, (odd ? second : mine.w[1]) >= call.threshold);
        use(n, 1, 0, (odd ? mine.w[2] : first) >= call.threshold);
        use(n, 1, 1, (odd ? mine.w[3] : second) >= call.threshold);
    }
}

}  // namespace prefix_fast::cuda
