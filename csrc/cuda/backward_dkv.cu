// Gradients of keys and values, segment-major: a block of keys stays, the queries of all its readers pass by.
//
//     p_ij = e^{s_ij - lse_i}                dv_j = Σ_i p_ij do_i
//     ds_ij = p_ij (do_i·v_j - δ_i)          dk_j = scale Σ_i ds_ij q_i
//
// The sum over i runs over all rows that read the segment, the heads of the group and their queries: one
// product with the reduction dimension rows × group × Tq, accumulated in float32 registers. Products are
// computed with keys as rows (k·qᵀ, v·doᵀ), so that p and ds are left operands as they lie. Own tokens are
// segments with one reader and a causal edge. Long reader lists are split over blocks that write float32
// parts, which `add_parts` adds in a fixed order: no atomics, the same bits every time.
#include "kernels.cuh"
#include "key_major.cuh"
#include "launch.cuh"

namespace prefix_fast::cuda {

// Each of kWarps warps has 16 keys; kQueries queries are in a tile, kStages tiles in shared memory. A head
// dim whose two sums have no room in registers takes two launches: kBoth is false. Options take registers
// from the scores.
template <typename T_, int kD, int kWarps_, int kQueries_, bool kKept, bool kBoth_ = true>
struct DkvShape {
    using T = T_;
    using S = Storage<T>;
    static constexpr int D = kD, kWarps = kWarps_, kQueries = kQueries_, kStages = 2;
    static constexpr bool kBoth = kBoth_;
    static constexpr int kThreads = kWarps * kWarp, kKeys = 16 * kWarps;
    static constexpr bool kInRegisters = kIsHalf<T> && kKept;  // the keys and values
    static constexpr int kTileElements = kQueries * kPitch<T, D>;
    static constexpr int kStageBytes = 2 * kTileElements * int{sizeof(S)};
    static constexpr int kPipelineBytes = kStages * kStageBytes;
    static constexpr int kKeyBytes = kInRegisters ? 0 : kKeys * kPitch<T, D> * int{sizeof(S)};
    static constexpr int kSharedBytes = kPipelineBytes + 2 * kKeyBytes;
    using Keys = std::conditional_t<kInRegisters, RegisterRows<T, 1, D>, SharedRows<T, D>>;

    __device__ static int first_row() { return warp() * 16; }
};
template <typename T, int D, bool kOptions>
struct DkvShapeOf;
template <typename T, bool kOptions>
struct DkvShapeOf<T, 64, kOptions> : DkvShape<T, 64, 4, kIsHalf<T> && !kOptions ? 64 : 32, !kOptions> {};
template <typename T, bool kOptions>
struct DkvShapeOf<T, 80, kOptions> : DkvShape<T, 80, 4, kIsHalf<T> ? 32 : 16, !kOptions> {};
template <typename T, bool kOptions>
struct DkvShapeOf<T, 96, kOptions> : DkvShape<T, 96, 4, kIsHalf<T> && !kOptions ? 32 : 16, !kOptions> {};
template <typename T, bool kOptions>
struct DkvShapeOf<T, 128, kOptions> : DkvShape<T, 128, 4, kIsHalf<T> && !kOptions ? 32 : 16, false> {};
template <typename T, bool kOptions>
struct DkvShapeOf<T, 256, kOptions> : DkvShape<T, 256, 2, kIsHalf<T> ? 16 : 8, false, false> {};

// No query outside [low, high) sees a key of the block, and every query of [full_low, full_high) sees all of
// them. All but `high` are multiples of `block`.
__device__ inline KeyBounds query_bounds(int first_key, int last_key, int begin, int offset, int count,
                                         int window, bool causal, bool sliding, int block) {
    KeyBounds bounds{0, 0, count / block * block, count};
    if (causal) {
        bounds.low = maximum(first_key - offset, 0) / block * block;
        bounds.full_low = ceil_div(maximum(last_key - offset, 0), block) * block;
    }
    if (sliding) {
        bounds.high = minimum(count, maximum(begin + last_key + window - offset, 0));
        bounds.full_high = minimum(count, maximum(begin + first_key + window - offset, 0)) / block * block;
    }
    return bounds;
}

// A row and head whose queries pass by: where they and what belongs to them begin.
struct Reader {
    ReaderPosition position;
    const char *query, *grad;  // at query 0
    const float* levels;       // δ stands at the same place of its own scratch
};

// How this thread copies them to a stage of the pipeline: queries, gradients, lse and δ.
template <typename Shape>
struct ReaderCopy : PairCopy<Shape, Shape::kQueries> {
    using Pair = PairCopy<Shape, Shape::kQueries>;
    LevelCopy<typename Shape::T, Shape::D, Shape::kQueries, Shape::kThreads> levels;

    __device__ ReaderCopy(const Call& call, const Saved& saved, const Reader& reader)
        : Pair{{reader.query, call.query.token, reader.position.count, call.head_dim, false},
               {reader.grad, saved.grad_out.token, reader.position.count, call.head_dim, false}},
          levels{reader.levels, saved.deltas + (reader.levels - saved.levels)} {}

    template <typename Simple>
    __device__ void load(int start, int stage, Simple) const {
        Pair::first.load(Pair::tile(stage), start);
        Pair::second.load(Pair::second_tile(stage), start);
        levels.load(Pair::tile(stage), start);
    }
};

// Adds the queries of a list, a tile at a time as `walk` does with keys.
template <typename Shape, bool kOptions, bool kKey, bool kValue>
__device__ inline void gather(const Call& call, const Saved& saved, const Reader& reader,
                              const TileList<Shape::kQueries>& list, const KeyBlock& block,
                              const typename Shape::Keys& keys, const typename Shape::Keys& values,
                              float (&dk)[1][kKey ? Shape::D / 8 : 1][4],
                              float (&dv)[1][kValue ? Shape::D / 8 : 1][4]) {
    using T = typename Shape::T;
    using S = typename Shape::S;
    constexpr int N = Shape::kQueries / 8, D = Shape::D;
    const ReaderCopy<Shape> copy(call, saved, reader);
    const auto use = [&](int start, int stage, auto edge) {
        const QueryColumns<T, D> queries{start, copy.tile(stage)};
        const S* grads = copy.second_tile(stage);
        float weights[N][4];
        ScoreParts<N, kOptions> parts;
        key_weights<Shape, kOptions>(call, reader.position, block, queries, edge, keys, weights, parts);
        if constexpr (kValue) {
            float kept[1][N][4];
            kept_weights(call, weights, parts, kept[0]);
            add_gradients<T, 1, N, D>(dv, kept, grads);
        }
        if constexpr (kKey) {
            float dp[N][4], ds[1][N][4];
            fill_zero_tile(dp);
            multiply_rows_of<T, N, D>(dp, values, grads);
            score_gradients(call, weights, dp, queries, parts, ds[0]);
            add_gradients<T, 1, N, D>(dk, ds, queries.rows);
        }
    };
    pipeline<Shape::kStages, !kOptions>(list, Constant<true>{}, copy, use);
}

// A block of keys of a segment.
__device__ inline KeyBlock key_block(const Call& call, const KeyGradients& grads, int unit, int first) {
    const SegmentSet& set = grads.of;
    const bool own = grads.set == call.num_sets;
    const Span span = span_of(unit, set.cu_seqlens, set.size);
    KeyBlock block;
    block.set = grads.set;
    block.first = first;
    block.size = span.count;
    block.valid = valid_span_of(set, unit).count;
    block.token = span.first;
    block.mask = {own && call.key_mask != nullptr ? call.key_mask + unit * call.mask_unit : nullptr,
                  call.mask_token};
    block.causal = own && call.causal;
    block.slides = slides(call, set, own);
    block.bias = &set.bias;
    return block;
}

// Grid: (key tiles of all segments × splits of the readers × splits of their queries, Hkv), for one set.
template <typename Shape, bool kOptions, bool kKey, bool kValue>
__global__ void __launch_bounds__(Shape::kThreads, resident_blocks(Shape::kThreads))
    dkv_kernel(const __grid_constant__ Call call, const __grid_constant__ Saved saved,
               const __grid_constant__ KeyGradients grads) {
    using T = typename Shape::T;
    using S = typename Shape::S;
    constexpr int D = Shape::D;
    const SegmentSet& set = grads.of;
    const bool own = grads.set == call.num_sets;
    const int group = call.heads / call.kv_heads, kv_head = blockIdx.y;
    const int part = blockIdx.x / grads.tiles, index = blockIdx.x % grads.tiles;
    const int split = part % grads.splits, query_split = part / grads.splits;
    int unit, tile;
    if (set.cu_seqlens.data == nullptr) {
        const int blocks = ceil_div(set.size, Shape::kKeys);
        unit = index / blocks, tile = index % blocks;
    } else {
        packed_tile(index, set.cu_seqlens, set.count, 1, Shape::kKeys, &unit, &tile);
    }
    const KeyBlock block = key_block(call, grads, unit, tile * Shape::kKeys);
    if (block.first >= block.size) return;

    typename Shape::Keys keys, values;
    load_block<Shape>(call, set, block, unit, kv_head, keys, values);
    int first_reader = own ? unit : 0, readers = own ? 1 : call.rows;
    if (!own && set.ids.data != nullptr) {
        first_reader = set.starts[unit];
        readers = set.starts[unit + 1] - first_reader;
    }
    const int pairs = block.first < block.valid ? readers * group : 0;
    const int share = ceil_div(pairs, grads.splits);
    const int chunk =
        ceil_div(ceil_div(call.max_queries, Shape::kQueries), grads.query_splits) * Shape::kQueries;
    const int last_key = minimum(block.first + Shape::kKeys, block.valid) - 1;

    float dk[1][kKey ? D / 8 : 1][4], dv[1][kValue ? D / 8 : 1][4];
    fill_zero(dk);
    fill_zero(dv);
#pragma unroll 1
    for (int pair = split * share; pair < minimum(split * share + share, pairs); ++pair) {
        int row = first_reader + pair / group;
        if (!own && set.ids.data != nullptr) row = set.order[row];
        Reader reader;
        const int head = kv_head * group + pair % group;
        const Span queries = span_of(row, call.cu_seqlens_q, call.max_queries);
        reader.position = {row, head, offset_of(call, row),
                           !own && block.slides ? -windowed_length(call, row, grads.set) : 0, queries.count};
        reader.query = static_cast<const char*>(call.query.data) +
                       offset_bytes(call.query, row, head, queries.first, sizeof(S));
        reader.grad = static_cast<const char*>(saved.grad_out.data) +
                      offset_bytes(saved.grad_out, row, head, queries.first, sizeof(S));
        const int64_t scratch = head * saved.capacity + scratch_start(call, row);
        reader.levels = saved.levels + scratch;
        const KeyBounds bounds =
            query_bounds(block.first, last_key, reader.position.begin, reader.position.offset, queries.count,
                         call.window, block.causal, block.slides, Shape::kQueries);
        const auto list =
            TileList<Shape::kQueries>::of(bounds, false, query_split * chunk, query_split * chunk + chunk);
        gather<Shape, kOptions, kKey, kValue>(call, saved, reader, list, block, keys, values, dk, dv);
    }
    // Asked for again: what only the stores need would take registers from the loops.
    const KeyBlock stored = key_block(call, grads, unit, tile * Shape::kKeys);
    if constexpr (kKey) {
        if (grads.key.data != nullptr) {
            store_gradients<T, D>(call, stored, grads.key, grads.key_parts, part * grads.key_part, unit,
                                  kv_head, set.is_float32, dk, call.scale);
        }
    }
    if constexpr (kValue) {
        if (grads.value.data != nullptr) {
            store_gradients<T, D>(call, stored, grads.value, grads.value_parts, part * grads.value_part, unit,
                                  kv_head, set.is_float32, dv, 1);
        }
    }
}

// target[i] = Σ_part parts[part, i], in float32 and in the order of the parts. Grid: (blocks of elements,).
constexpr int kAddThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kAddThreads)
    add_parts_kernel(const float* parts, char* target, int64_t count, int number, int32_t dtype) {
    const int64_t index = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
    if (index >= count) return;
    float total = 0;
    for (int part = 0; part < number; ++part) total += parts[part * count + index];
    write_float(target, index, total, dtype);
}

template <typename Shape, bool kOptions>
int launch_keys(const Call& call, const Saved& saved, const KeyGradients& given, void* stream) {
    const SegmentSet& set = call.sets[given.set];
    KeyGradients grads = given;
    grads.tiles = set.cu_seqlens.data != nullptr ? set.size / Shape::kKeys + set.count
                                                 : set.count * ceil_div(set.size, Shape::kKeys);
    const dim3 grid(grads.tiles * grads.splits * grads.query_splits, call.kv_heads), block(Shape::kThreads);
    const auto run = [&](auto kernel) {
        return PREFIX_FAST_LAUNCH(kernel, grid, block, Shape::kSharedBytes, static_cast<cudaStream_t>(stream),
                                  call, saved, grads);
    };
    cudaError_t error = cudaSuccess;
    if constexpr (Shape::kBoth) {
        error = run(dkv_kernel<Shape, kOptions, true, true>);
    } else {
        if (grads.key.data != nullptr) error = run(dkv_kernel<Shape, kOptions, true, false>);
        if (error == cudaSuccess && grads.value.data != nullptr)
            error = run(dkv_kernel<Shape, kOptions, false, true>);
    }
    return static_cast<int>(error);
}

template <typename T>
int backward_keys(const Call& call, const Saved& saved, const KeyGradients& grads, void* stream) {
    return with_head_dim<T>(call.head_dim, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        return has_options(call) ? launch_keys<DkvShapeOf<T, D, true>, true>(call, saved, grads, stream)
                                 : launch_keys<DkvShapeOf<T, D, false>, false>(call, saved, grads, stream);
    });
}

}  // namespace prefix_fast::cuda

#define PREFIX_FAST_DEFINE(name, type)                                                                       \
    PREFIX_FAST_EXPORT int prefix_fast_backward_keys_##name(                                                 \
        const prefix_fast::cuda::Call* call, const prefix_fast::cuda::Saved* saved,                          \
        const prefix_fast::cuda::KeyGradients* grads, void* stream) {                                        \
        return prefix_fast::cuda::backward_keys<type>(*call, *saved, *grads, stream);                        \
    }                                                                                                        \
    PREFIX_FAST_EXPORT int prefix_fast_add_parts_##name(const float* parts, void* target, int64_t count,     \
                                                        int number, int32_t dtype, void* stream) {           \
        using namespace prefix_fast::cuda;                                                                   \
        const dim3 grid(static_cast<unsigned>((count + kAddThreads - 1) / kAddThreads)), block(kAddThreads); \
        return PREFIX_FAST_LAUNCH(add_parts_kernel<type>, grid, block, 0, static_cast<cudaStream_t>(stream), \
                                  parts, static_cast<char*>(target), count, number, dtype);                  \
    }
PREFIX_FAST_TYPES(PREFIX_FAST_DEFINE)
