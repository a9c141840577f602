// What the kernels with keys as rows share: weights and gradients of a tile of scores, 16 keys of a warp by 8
// N queries.
//
//     pᵀ_ji = e^{s_ij - lse_i}      dsᵀ_ji = p_ij (do_i·v_j - δ_i)
//
// Keys that are not present have weights too (of zeros in place of k): a row of the sums that is never
// stored.
#pragma once

#include "walk.cuh"

namespace prefix_fast::cuda {

// A block of keys of one segment.
struct KeyBlock {
    int set, first, valid, size;  // first key; keys that are valid, and that exist, of the segment
    int64_t token;                // of the segment's first key
    KeyMask mask;
    bool causal, slides, want_key, want_value;
};

// A row and head, the position of its query 0 among its own tokens, and of the segment's key 0.
struct ReaderPosition {
    int row, head, offset, begin;
};

// A tile of its queries: lse and δ of each lie in shared memory.
struct QueryColumns {
    int start;
    const float *levels, *deltas;
};

// What a tile of scores had besides weights; nothing without options.
template <int N, bool kOptions>
struct ScoreParts {};
template <int N>
struct ScoreParts<N, true> {
    float slopes[N][4];
    uint32_t kept[(4 * N + 31) / 32];  // bits of weights that dropout keeps
    float inverse;                     // of the share that it keeps
};

template <int N>
__device__ inline void fill_zero_tile(float (&tile)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) tile[n][i] = 0;
    }
}

// tile += rows · rightᵀ.
template <typename T, int N, int D, typename Left>
__device__ inline void multiply_rows_of(float (&tile)[N][4], const Left& rows, const Storage<T>* right) {
    multiply_transposed<T, 1, N, D>(reinterpret_cast<float (&)[1][N][4]>(tile), rows, right);
}

// This warp's keys and values of a block; absent and hidden ones are zeros.
template <typename Shape>
__device__ inline void load_block(const Call& call, const SegmentSet& set, const KeyBlock& block, int unit,
                                  int kv_head, typename Shape::Keys& keys, typename Shape::Keys& values) {
    using T = typename Shape::T;
    using S = typename Shape::S;
    const Chain chain = chain_of(set, unit, kv_head, 0, sizeof(S));
    const auto load = [&](const char* data, int64_t stride, int slot) {
        typename Shape::Keys rows;
        if constexpr (Shape::kInRegisters) {
            const char* pointers[1][2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = block.first + warp() * 16 + 8 * half + lane_row();
                const int bytes = set.is_float32 ? 4 : int{sizeof(S)};
                const bool present = key < block.valid && !block.mask.hides(key);
                pointers[0][half] = present ? data + key * stride * bytes : nullptr;
            }
            rows.load(pointers, call.head_dim, Sign{0xFFFFFFFFu, 0}, set.is_float32);
        } else {
            auto* tile =
                reinterpret_cast<S*>(dynamic_shared + Shape::kPipelineBytes + slot * Shape::kKeyBytes);
            const TileCopy<T, Shape::kKeys, Shape::D, Shape::kThreads> copy(data, stride, block.valid,
                                                                            call.head_dim, set.is_float32);
            copy.load(tile, block.first, block.mask, set.is_float32);
            cp_async_commit();
            cp_async_wait<0>();
            copy.arrived(tile);
            rows.data = tile + warp() * 16 * kPitch<T, Shape::D>;
        }
        return rows;
    };
    keys = load(chain.key, set.key.token, 0);
    values = load(chain.value, set.value.token, 1);
}

// Bits of the weights that dropout keeps, in the order of the tile's elements.
//
// Word key % 4 of counter (query, key / 4, ...) decides: the four lanes of a query pair whose keys g are in
// one group of four need the same four counters (two queries, keys g and g + 8). Each draws one of them, and
// they exchange words.
template <int N>
__device__ inline void draw_kept(const Call& call, const ReaderPosition& reader, const KeyBlock& block,
                                 const QueryColumns& columns, ScoreParts<N, true>& parts) {
    const uint64_t seed = *call.seed;
    const uint32_t stream = reader.row * call.heads + reader.head;
    const int mine = lane_row() % 4;  // counter that this lane draws: query mine % 2, keys g + 8 (mine / 2)
    const int key = block.first + warp() * 16 + lane_row() + mine / 2 * 8;
#pragma unroll
    for (uint32_t& bits : parts.kept) bits = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const uint32_t query = columns.start + 8 * n + lane_column() + mine % 2;
        const Words words = philox(seed, query, key / 4, stream, block.set);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            // With the lane whose g differs by `step` in the lowest bits: it needs word `partner` of my
            // counter, and I word `mine` of its counter `partner`.
            const int partner = mine ^ step;
            const uint32_t given = partner == 0   ? words.w[0]
                                   : partner == 1 ? words.w[1]
                                   : partner == 2 ? words.w[2]
                                                  : words.w[3];
            const uint32_t word = __shfl_xor_sync(0xFFFFFFFFu, given, step * 4);
            if (word >= call.threshold) {  // element (half, column) = (partner / 2, partner % 2)
                const int element = 4 * n + partner;
                parts.kept[4 * n / 32] |= 1u << (element % 32);
            }
        }
    }
}

// Hides what queries do not see of keys that are present: weights 0.
template <int N>
__device__ inline void hide_queries(const Call& call, const ReaderPosition& reader, const KeyBlock& block,
                                    const QueryColumns& columns, float (&weights)[N][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = block.first + warp() * 16 + 8 * half + lane_row() - reader.offset;
        const int first = block.causal ? key : -0x7FFFFFFF;
        const int last = block.slides ? key + reader.begin + call.window - 1 : 0x7FFFFFFF;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int query = columns.start + 8 * n + lane_column() + c;
                if (query < first || query > last) weights[n][2 * half + c] = 0;
            }
        }
    }
}

template <int N>
__device__ inline void add_bias_of_keys(const Call& call, const Bias& bias, const ReaderPosition& reader,
                                        const KeyBlock& block, const QueryColumns& columns,
                                        float (&scores)[N][4]) {
    const int64_t base = reader.row * bias.row + reader.head * bias.head;
    const int count = span_of(reader.row, call.cu_seqlens_q, call.max_queries).count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = block.first + warp() * 16 + 8 * half + lane_row();
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int query = columns.start + 8 * n + lane_column() + c;
                if (key < block.valid && query < count) {
                    scores[n][2 * half + c] +=
                        read_float(bias.data, base + query * bias.query + key * bias.key, bias.dtype);
                }
            }
        }
    }
}

// Weights of a tile before dropout. edge: some query may not see some key.
template <typename Shape, bool kOptions, typename Edge, int N>
__device__ inline void key_weights(const Call& call, const ReaderPosition& reader, const KeyBlock& block,
                                   const QueryColumns& columns, Edge edge, const typename Shape::Keys& keys,
                                   const typename Shape::S* queries, float (&weights)[N][4],
                                   ScoreParts<N, kOptions>& parts) {
    fill_zero_tile(weights);
    multiply_rows_of<typename Shape::T, N, Shape::D>(weights, keys, queries);
    if constexpr (kOptions) {
        if (call.softcap != 0) {
            apply_softcap(weights, parts.slopes, call.scale, call.softcap);
        } else {
            apply_scale(weights, call.scale);
        }
        const Bias& bias = call.sets[block.set].bias;
        if (bias.data != nullptr) add_bias_of_keys(call, bias, reader, block, columns, weights);
        if (call.seed != nullptr) {
            draw_kept(call, reader, block, columns, parts);
            parts.inverse = 1 / call.kept_share;
        }
    }
    const float unit = unit_of<kOptions>(call.scale);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const uint2 pair = load_shared_8(columns.levels + 8 * n + lane_column());
        const float levels[2] = {as_float(pair.x), as_float(pair.y)};
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[n][i] = exponential<kOptions>(weights[n][i], unit, levels[i % 2]);
    }
    if (edge) hide_queries(call, reader, block, columns, weights);
}

// Weights after dropout.
template <int N, bool kOptions>
__device__ inline void kept_weights(const Call& call, const float (&weights)[N][4],
                                    const ScoreParts<N, kOptions>& parts, float (&kept)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            kept[n][i] = weights[n][i];
            if constexpr (kOptions) {
                if (call.seed != nullptr) {
                    const bool is_kept = parts.kept[4 * n / 32] >> ((4 * n + i) % 32) & 1;
                    kept[n][i] = is_kept ? weights[n][i] * parts.inverse : 0;
                }
            }
        }
    }
}

// dsᵀ from v·doᵀ; scaled where the sums are stored.
template <int N, bool kOptions>
__device__ inline void score_gradients(const Call& call, const float (&weights)[N][4],
                                       const float (&dp)[N][4], const QueryColumns& columns,
                                       const ScoreParts<N, kOptions>& parts, float (&ds)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const uint2 pair = load_shared_8(columns.deltas + 8 * n + lane_column());
        const float deltas[2] = {as_float(pair.x), as_float(pair.y)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float value = dp[n][i];
            if constexpr (kOptions) {
                if (call.seed != nullptr) {
                    const bool is_kept = parts.kept[4 * n / 32] >> ((4 * n + i) % 32) & 1;
                    value = is_kept ? value * parts.inverse : 0;
                }
            }
            ds[n][i] = weights[n][i] * (value - deltas[i % 2]);
            if constexpr (kOptions) {
                if (call.softcap != 0) ds[n][i] *= parts.slopes[n][i];
            }
        }
    }
}

// Stores a block of gradients, or a part of it: exact zeros where no key is valid.
template <typename T, int D>
__device__ inline void store_gradients(const Call& call, const KeyBlock& block, const Tokens& target,
                                       float* parts, int64_t part_offset, int64_t unit, int kv_head,
                                       bool is_float32, const float (&sums)[1][D / 8][4], float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = block.first + warp() * 16 + 8 * half + lane_row();
        if (key >= block.size) continue;
        const bool present = key < block.valid && !block.mask.hides(key);
        const int64_t place = unit * target.unit + kv_head * target.head + (block.token + key) * target.token;
        const float scale = present ? factor : 0;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            if (8 * n >= call.head_dim) break;
            const float first = present ? sums[0][n][2 * half] * scale : 0;
            const float second = present ? sums[0][n][2 * half + 1] * scale : 0;
            const int column = 8 * n + lane_column();
            if (parts != nullptr) {
                store_pair<float>(reinterpret_cast<char*>(parts + part_offset + place), column, first,
                                  second);
            } else if (is_float32) {
                store_pair<float>(static_cast<char*>(target.data) + place * 4, column, first, second);
            } else {
                store_pair<T>(static_cast<char*>(target.data) + place * int{sizeof(Storage<T>)}, column,
                              first, second);
            }
        }
    }
}

}  // namespace prefix_fast::cuda
