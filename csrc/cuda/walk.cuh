// What the row-major kernels share: the keys that a block of queries walks, through a pipeline of tiles in
// shared memory.
//
// Keys and values of a tile are one group of asynchronous copies, kStages - 1 tiles ahead of the products.
#pragma once

#include "loads.cuh"
#include "softmax.cuh"

namespace prefix_fast::cuda {

// The tiles of kKeys keys of a run [low, high), those first in which every query sees every key.
template <int kKeys>
struct TileList {
    int full, without_after, all;  // tiles: whole ones; with those before them; with those behind them
    int bases[3];                  // where each of the three runs would begin if it began with tile 0

    // `begin` and `end` cut the run: multiples of kKeys, or beyond it. `masked`: no tile is known to be seen
    // whole.
    __device__ static TileList of(const KeyBounds& bounds, bool masked, int begin, int end) {
        const int low = maximum(bounds.low, begin), high = minimum(bounds.high, end);
        int full_low = minimum(maximum(bounds.full_low, low), ceil_div(maximum(high, 0), kKeys) * kKeys);
        int full_high = maximum(minimum(bounds.full_high, high / kKeys * kKeys), full_low);
        if (masked) full_high = full_low;
        TileList list;
        list.full = (full_high - full_low) / kKeys;
        list.without_after = list.full + ceil_div(maximum(minimum(full_low, high) - low, 0), kKeys);
        list.all = list.without_after + ceil_div(maximum(high - full_high, 0), kKeys);
        list.bases[0] = full_low;
        list.bases[1] = low - list.full * kKeys;
        list.bases[2] = full_high - list.without_after * kKeys;
        return list;
    }
    __device__ int start(int index) const {
        return index * kKeys + (index < full ? bases[0] : index < without_after ? bases[1] : bases[2]);
    }
};

// Calls use(start, stage, edge) for every tile of a list, kStages - 1 tiles behind copies.load(start, stage,
// simple); copies.arrived(stage) is between them, before a barrier. A stage is its offset in shared memory.
//
// With kTwoLoops the tiles without an edge have a loop of their own if the loads are simple, in which both
// are constants.
template <int kStages, bool kTwoLoops, typename List, typename Simple, typename Copies, typename Use>
__device__ inline void pipeline(const List& list, Simple simple, const Copies& copies, const Use& use) {
    constexpr int kBytes = Copies::kStageBytes, kLast = (kStages - 1) * kBytes;
    const auto before = [](int stage) {
        return kStages == 2 ? kBytes - stage : stage == 0 ? kLast : stage - kBytes;
    };
    const auto behind = [](int stage) {
        return kStages == 2 ? kBytes - stage : stage == kLast ? 0 : stage + kBytes;
    };
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        if (i < list.all) copies.load(list.start(i), i * kBytes, simple);
        cp_async_commit();
    }
    int stage = 0;
    const auto step = [&](int index, auto is_simple, auto edge) {
        cp_async_wait<kStages - 2>();
        copies.arrived(stage);
        __syncthreads();
        const int next = index + kStages - 1;
        if (next < list.all) copies.load(list.start(next), before(stage), is_simple);
        cp_async_commit();
        use(list.start(index), stage, edge);
        stage = behind(stage);
    };
    int index = 0;
    if constexpr (kTwoLoops) {
        const int full = simple ? list.full : 0;
#pragma unroll 1
        for (; index < full; ++index) step(index, Constant<true>{}, Constant<false>{});
    }
#pragma unroll 1
    for (; index < list.all; ++index) step(index, simple, index >= list.full);
    cp_async_wait<0>();
}

// How this thread copies two runs of rows to the stages of a pipeline: keys and values, or queries and the
// output's gradients. A tile of the second lies behind that of the first.
template <typename Shape, int kRows>
struct PairCopy {
    using T = typename Shape::T;
    using S = typename Shape::S;
    static constexpr int kStageBytes = Shape::kStageBytes;
    TileCopy<T, kRows, Shape::D, Shape::kThreads> first, second;

    __device__ static S* tile(int stage) { return reinterpret_cast<S*>(dynamic_shared + stage); }
    __device__ static S* second_tile(int stage) { return tile(stage) + Shape::kTileElements; }

    __device__ void arrived(int stage) const {
        first.arrived(tile(stage));
        second.arrived(second_tile(stage));
    }
};

// Sizes of a forward kernel: kWarps / kKeyWarps warps have 16 M rows of queries each, and kKeyWarps share
// their keys; kKeys keys are in a tile, kStages tiles in shared memory.
template <typename T_, int kD, int kM, int kWarps_, int kKeys_, int kStages_, int kKeyWarps_ = 1,
          int kMostInRegisters = 128>
struct ForwardShape {
    using T = T_;
    using S = Storage<T>;
    static constexpr int D = kD, M = kM, kWarps = kWarps_, kKeys = kKeys_, kStages = kStages_;
    static constexpr int kKeyWarps = kKeyWarps_, kKeysOfWarp = kKeys / kKeyWarps;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kRowsOfWarp = 16 * M;
    static constexpr int kQueries = kRowsOfWarp * kWarps / kKeyWarps;
    static constexpr bool kInRegisters = kIsHalf<T> && D <= kMostInRegisters;  // the queries
    static constexpr int kTileElements = kKeys * kPitch<T, D>;
    static constexpr int kStageBytes = 2 * kTileElements * int{sizeof(S)};
    static constexpr int kPipelineBytes = kStages * kStageBytes;
    static constexpr int kQueryBytes = kInRegisters ? 0 : kQueries * kPitch<T, D> * int{sizeof(S)};
    static constexpr int kSharedBytes = kPipelineBytes + kQueryBytes;
    using Queries = std::conditional_t<kInRegisters, RegisterRows<T, M, D>, SharedRows<T, D>>;

    __device__ static int first_row() { return warp() / kKeyWarps * kRowsOfWarp; }  // of this warp
    __device__ static int first_key() { return warp() % kKeyWarps * kKeysOfWarp; }  // in a tile
};

// This warp's rows of the tile row_at(0) to row_at(kQueries - 1), null: zeros; `slot`-th of those in shared
// memory.
template <typename Shape, typename RowAt>
__device__ inline typename Shape::Queries load_queries(int head_dim, Sign sign, int slot,
                                                       const RowAt& row_at) {
    using T = typename Shape::T;
    typename Shape::Queries queries;
    if constexpr (Shape::kInRegisters) {
        const char* pointers[Shape::M][2];
#pragma unroll
        for (int m = 0; m < Shape::M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                pointers[m][half] = row_at(Shape::first_row() + 16 * m + 8 * half + lane_row());
            }
        }
        queries.load(pointers, head_dim, sign);
    } else {
        auto* tile =
            reinterpret_cast<Storage<T>*>(dynamic_shared + Shape::kPipelineBytes + slot * Shape::kQueryBytes);
        store_rows<T, Shape::kQueries, Shape::D, Shape::kThreads>(tile, head_dim, sign, row_at);
        queries.data = tile + Shape::first_row() * kPitch<T, Shape::D>;
    }
    return queries;
}

// The scale of queries that took its sign, so that the largest product is the largest logit.
__device__ inline float positive_scale(const Call& call) {
    return call.scale == 0 ? 1 : fabsf(call.scale);
}

// The keys and values that a run of tiles is read from.
struct Source {
    Chain chain;
    int64_t key_stride, value_stride;
    bool is_float32;
    KeyMask mask;
    int head_dim;
};

// How this thread copies a run of keys and values.
template <typename Shape>
struct ChainCopy : PairCopy<Shape, Shape::kKeys> {
    using Pair = PairCopy<Shape, Shape::kKeys>;
    KeyMask mask;
    bool is_float32;

    __device__ explicit ChainCopy(const Source& source)
        : Pair{{source.chain.key, source.key_stride, source.chain.valid, source.head_dim, source.is_float32},
               {source.chain.value, source.value_stride, source.chain.valid, source.head_dim,
                source.is_float32}},
          mask(source.mask),
          is_float32(source.is_float32) {}

    __device__ bool is_simple() const { return !is_float32 && mask.data == nullptr; }

    template <typename Simple>
    __device__ void load(int start, int stage, Simple simple) const {
        auto *keys = Pair::tile(stage), *values = Pair::second_tile(stage);
        if (simple) {
            Pair::first.load(keys, start);
            Pair::second.load(values, start);
        } else {
            Pair::first.load(keys, start, mask, is_float32);
            Pair::second.load(values, start, mask, is_float32);
        }
    }
};

// Calls use(start, keys, edge) for the tiles of a list in turn: first those that every query sees whole, then
// the others, whose edge is true. All threads of the block call it; the barrier at its start frees the
// buffers of the last walk.
template <typename Shape, bool kTwoLoops, typename Use>
__device__ inline void walk(const TileList<Shape::kKeys>& list, const Source& source, const Use& use) {
    const ChainCopy<Shape> copies(source);
    pipeline<Shape::kStages, kTwoLoops>(
        list, copies.is_simple(), copies,
        [&](int start, int stage, auto edge) { use(start, copies.tile(stage), edge); });
}

// What a tile of the queries of one row and head walks of set `s`.
template <int kKeys>
struct RowWalk {
    KeyTile tile;
    TileList<kKeys> list;
    Source source;
};

// `first` and `last` are the positions of the tile's queries among the own tokens.
template <int kKeys>
__device__ inline RowWalk<kKeys> walk_of_row(const Call& call, int s, int row, int kv_head, int first,
                                             int last, int bytes) {
    const SegmentSet& set = call.sets[s];
    const bool own = s == call.num_sets;
    const Chain chain = open_set(call, s, row, kv_head, bytes);
    KeyMask mask{nullptr, call.mask_token};
    if (own && call.key_mask != nullptr) mask.data = call.key_mask + row * call.mask_unit;
    const KeyTile tile{s, 0, chain.valid, chain.begin, own && call.causal != 0, slides(call, s), mask};
    const KeyBounds bounds =
        key_bounds(first, last, chain.begin, chain.valid, call.window, tile.causal, tile.slides, kKeys);
    Chain seen = chain;  // keys that come later than all of the tile's queries are not read
    seen.valid = bounds.high;
    return {tile,
            TileList<kKeys>::of(bounds, mask.data != nullptr, 0, chain.valid),
            {seen, set.key.token, set.value.token, set.is_float32 != 0, mask, call.head_dim}};
}

// Where this thread's rows stand in a tile of one row and head, and their addresses in a tensor like the
// queries (null: past the last).
template <typename Shape>
__device__ inline Rows<Shape::M> rows_of(const QueryTile& tile, int head, int offset) {
    Rows<Shape::M> rows;
#pragma unroll
    for (int m = 0; m < Shape::M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int place = Shape::first_row() + 16 * m + 8 * half + lane_row();
            rows.row[m][half] = tile.row;
            rows.head[m][half] = head;
            rows.token[m][half] = minimum(tile.first + place, tile.count - 1);
            rows.position[m][half] = tile.first + place + offset;
        }
    }
    return rows;
}

// This warp's queries of a tile of one row and head of a tensor, `slot`-th of those that lie in shared
// memory.
template <typename Shape>
__device__ inline typename Shape::Queries load_tile_rows(const Call& call, const Tokens& tensor,
                                                         const QueryTile& tile, int head, Sign sign,
                                                         int slot) {
    const int64_t bytes = tensor.token * int{sizeof(typename Shape::S)};
    const char* base = static_cast<const char*>(tensor.data) +
                       offset_bytes(tensor, tile.row, head, tile.token, sizeof(typename Shape::S));
    return load_queries<Shape>(call.head_dim, sign, slot, [&](int place) -> const char* {
        return tile.first + place < tile.count ? base + place * bytes : nullptr;
    });
}

}  // namespace prefix_fast::cuda
