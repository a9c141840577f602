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
    bool causal, slides;
    const Bias* bias;  // with options
};

// A row and head, the position of its query 0 among its own tokens, and of the segment's key 0; its queries.
struct ReaderPosition {
    int row, head, offset, begin, count;
};

// A tile of its queries, in shared memory. lse and δ lie in the padding of the rows: of queries 2i and 2i + 1
// behind row 2i, so that a lane's pair is one load.
template <typename T, int D>
struct QueryColumns {
    int start;
    const Storage<T>* rows;

    __device__ static float* level_of(Storage<T>* rows, int query) {
        return reinterpret_cast<float*>(rows + query / 2 * 2 * kPitch<T, D> + D) + query % 2;
    }
    __device__ static float* delta_of(Storage<T>* rows, int query) { return level_of(rows, query) + 2; }

    // lse or δ of the queries 8n + lane_column() and the next.
    __device__ float2 levels(int n) const { return pair(n, 0); }
    __device__ float2 deltas(int n) const { return pair(n, 2); }

  private:
    __device__ float2 pair(int n, int first) const {
        const auto* row = rows + (8 * n + lane_column()) * kPitch<T, D> + D;
        const uint2 bits = load_shared_8(reinterpret_cast<const float*>(row) + first);
        return {as_float(bits.x), as_float(bits.y)};
    }
};

// How this thread copies them there, asynchronously: lse or δ of one query of a tile.
template <typename T, int D, int kQueries, int kThreads>
struct LevelCopy {
    static_assert(2 * kQueries <= kThreads);
    const float *levels, *deltas;  // of the query at start 0

    __device__ void load(Storage<T>* rows, int start) const {
        using Columns = QueryColumns<T, D>;
        if (threadIdx.x >= 2 * kQueries) return;
        const bool is_delta = threadIdx.x >= kQueries;
        const int query = threadIdx.x % kQueries;
        cp_async_4(is_delta ? Columns::delta_of(rows, query) : Columns::level_of(rows, query),
                   (is_delta ? deltas : levels) + start + query, true);
    }
};

// What a tile of scores had besides weights; nothing without options.
template <int N, bool kOptions>
struct ScoreParts {};
template <int N>
struct ScoreParts<N, true> {
    float slopes[N][4];
    uint32_t kept[(4 * N + 31) / 32];  // bits of weights that dropout keeps
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
                                 int start, ScoreParts<N, true>& parts) {
    const uint64_t seed = *call.seed;
    const uint32_t stream = reader.row * call.heads + reader.head;
    const int mine = lane_row() % 4;  // counter that this lane draws: query mine % 2, keys g + 8 (mine / 2)
    const int key = block.first + warp() * 16 + lane_row() + mine / 2 * 8;
#pragma unroll
    for (uint32_t& bits : parts.kept) bits = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const uint32_t query = start + 8 * n + lane_column() + mine % 2;
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
                                    int start, float (&weights)[N][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = block.first + warp() * 16 + 8 * half + lane_row() - reader.offset;
        const int first = block.causal ? key : -0x7FFFFFFF;
        const int last = block.slides ? key + reader.begin + call.window - 1 : 0x7FFFFFFF;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int query = start + 8 * n + lane_column() + c;
                if (query < first || query > last) weights[n][2 * half + c] = 0;
            }
        }
    }
}

template <int N>
__device__ inline void add_bias_of_keys(const Call& call, const Bias& bias, const ReaderPosition& reader,
                                        const KeyBlock& block, int start, float (&scores)[N][4]) {
    with_bias(bias, [&](const auto& element) {
        const int first = start + lane_column();
        const int64_t step = bias.query * element.kBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = block.first + warp() * 16 + 8 * half + lane_row();
            const int queries = key < block.valid ? reader.count : 0;
            const char* at =
                static_cast<const char*>(bias.data) + first * step +
                (reader.row * bias.row + reader.head * bias.head + key * bias.key) * element.kBytes;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    if (first + 8 * n + c < queries) scores[n][2 * half + c] += element(at);
                    at += (c == 0 ? 1 : 7) * step;
                }
            }
        }
    });
}

// Weights of a tile before dropout. edge: some query may not see some key.
template <typename Shape, bool kOptions, typename Edge, int N, typename Columns>
__device__ inline void key_weights(const Call& call, const ReaderPosition& reader, const KeyBlock& block,
                                   const Columns& queries, Edge edge, const typename Shape::Keys& keys,
                                   float (&weights)[N][4], ScoreParts<N, kOptions>& parts) {
    if constexpr (kOptions) {
        if (call.seed != nullptr) {  // before the product: it needs the registers
            draw_kept(call, reader, block, queries.start, parts);
        }
    }
    fill_zero_tile(weights);
    multiply_rows_of<typename Shape::T, N, Shape::D>(weights, keys, queries.rows);
    if constexpr (kOptions) {
        if (call.softcap != 0) {
            apply_softcap(weights, parts.slopes, call.scale, call.softcap);
        } else {
            apply_scale(weights, call.scale);
        }
        if (block.bias->data != nullptr)
            add_bias_of_keys(call, *block.bias, reader, block, queries.start, weights);
    }
    const float unit = unit_of<kOptions>(call.scale);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const float2 levels = queries.levels(n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            weights[n][i] = exponential<kOptions>(weights[n][i], unit, i % 2 == 0 ? levels.x : levels.y);
        }
    }
    if (edge) hide_queries(call, reader, block, queries.start, weights);
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
                    kept[n][i] = is_kept ? weights[n][i] * call.inverse_share : 0;
                }
            }
        }
    }
}

// dsᵀ from v·doᵀ; scaled where the sums are stored.
template <int N, bool kOptions, typename Columns>
__device__ inline void score_gradients(const Call& call, const float (&weights)[N][4],
                                       const float (&dp)[N][4], const Columns& queries,
                                       const ScoreParts<N, kOptions>& parts, float (&ds)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const float2 deltas = queries.deltas(n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float value = dp[n][i];
            if constexpr (kOptions) {
                if (call.seed != nullptr) {
                    const bool is_kept = parts.kept[4 * n / 32] >> ((4 * n + i) % 32) & 1;
                    value = is_kept ? value * call.inverse_share : 0;
                }
            }
            ds[n][i] = weights[n][i] * (value - (i % 2 == 0 ? deltas.x : deltas.y));
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
    using S = Storage<T>;
    for_each_gradient_row<T, 1, D>(sums, [&](int of_warp, const auto& columns) {
        const int key = block.first + warp() * 16 + of_warp;
        if (key >= block.size) return;
        const bool present = key < block.valid && !block.mask.hides(key);
        const int64_t place = unit * target.unit + kv_head * target.head + (block.token + key) * target.token;
        char* const row = parts != nullptr
                              ? reinterpret_cast<char*>(parts + part_offset + place)
                              : static_cast<char*>(target.data) + place * (is_float32 ? 4 : int{sizeof(S)});
        columns([&](int column, auto values) {
            if (column >= call.head_dim) return;
            values = present ? scaled(values, factor) : decltype(values){};
            if (parts != nullptr || is_float32) {
                store_columns<float>(row, column, values);
            } else {
                store_columns<S>(row, column, values);
            }
        });
    });
}

}  // namespace prefix_fast::cuda
