// Backward of a short prefix (P ≤ 64), fused: the gradients of the queries and of the prefix in one pass.
//
//     p_ij = e^{s_ij - lse_i}                dv_j = Σ_i p_ij do_i
//     ds_ij = p_ij (do_i·v_j - δ_i)          dk_j = scale Σ_i ds_ij q_i          dq_i = scale Σ_j ds_ij k_j
//
// Five products of scores instead of the seven of dq and dkv apart, one exponential instead of two, and
// queries and output gradients are read once. A block keeps a segment, and the float32 sums of its dk and dv
// in registers, while the query tiles of its readers pass by, the longest first; the blocks of a segment take
// tiles in turn. For each tile it computes sᵀ = k·qᵀ with 16 keys a warp, and leaves dsᵀ in shared memory,
// where it is the transposed left operand of dq. The own tokens' part of dq follows as in `dq_kernel`.
// float16 and bfloat16, plain scores (no softcap, bias or dropout), dense rows and one dense set; head dims
// whose three sums have room in registers.
#include "descend.cuh"
#include "kernels.cuh"
#include "key_major.cuh"
#include "launch.cuh"

namespace prefix_fast::cuda {

// 16 keys of the segment and 16 queries of a tile for each of four warps; kKeys own keys are in a tile.
template <typename T_, int kD, int kOwnKeys>
struct ShortShape {
    using T = T_;
    using S = Storage<T>;
    using Queries = SharedRows<T, kD>;
    using Keys = SharedRows<T, kD>;
    static constexpr int D = kD, M = 1, kWarps = 4, kThreads = kWarps * kWarp;
    static constexpr int kQueries = 16 * kWarps, kSegment = kShortKeys, kKeys = kOwnKeys, kStages = 2;
    static constexpr int kTileElements = kKeys * kPitch<T, D>;
    static constexpr int kStageBytes = 2 * kTileElements * int{sizeof(S)};
    static constexpr int kPipelineBytes = kStages * kStageBytes;
    static constexpr int kRowElements = kQueries * kPitch<T, D>;  // of queries, gradients, keys, values
    static constexpr int kGradientPitch = kQueries + kChunk<T>;   // of dsᵀ
    static constexpr int kSharedBytes =
        kPipelineBytes + (4 * kRowElements + kSegment * kGradientPitch) * int{sizeof(S)};
    static_assert(kSegment == kQueries);

    __device__ static int first_row() { return warp() * 16; }
    __device__ static S* rows(int index) {  // queries, gradients, keys, values, dsᵀ
        return reinterpret_cast<S*>(dynamic_shared + kPipelineBytes) + index * kRowElements;
    }
};

// A query tile of one row and head into shared memory: queries, gradients, lse and δ.
template <typename Shape>
__device__ inline void load_tile_of_reader(const Call& call, const Saved& saved, const QueryTile& tile,
                                           int head) {
    using T = typename Shape::T;
    const Tokens tensors[2] = {call.query, saved.grad_out};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const char* base = static_cast<const char*>(tensors[i].data) +
                           offset_bytes(tensors[i], tile.row, head, 0, sizeof(typename Shape::S));
        const TileCopy<T, Shape::kQueries, Shape::D, Shape::kThreads> copy(base, tensors[i].token, tile.count,
                                                                           call.head_dim, false);
        copy.load(Shape::rows(i), tile.first);
    }
    const int64_t scratch = head * saved.capacity + scratch_start(call, tile.row) + tile.first;
    const LevelCopy<T, Shape::D, Shape::kQueries, Shape::kThreads> levels{saved.levels + scratch,
                                                                          saved.deltas + scratch};
    levels.load(Shape::rows(0), 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

// Adds a tile to dk and dv, and the segment's part of its dq to `dq`.
template <typename Shape>
__device__ inline void add_segment(const Call& call, const ReaderPosition& reader, const KeyBlock& block,
                                   int start, float (&dk)[1][Shape::D / 8][4],
                                   float (&dv)[1][Shape::D / 8][4], float (&dq)[1][Shape::D / 8][4]) {
    using T = typename Shape::T;
    constexpr int N = Shape::kQueries / 8, D = Shape::D;
    const QueryColumns<T, D> queries{start, Shape::rows(0)};
    const auto* grads = Shape::rows(1);
    const typename Shape::Keys keys{Shape::rows(2) + Shape::first_row() * kPitch<T, D>};
    const typename Shape::Keys values{Shape::rows(3) + Shape::first_row() * kPitch<T, D>};
    ScoreParts<N, false> parts;
    float weights[1][N][4], dp[N][4], ds[1][N][4];
    key_weights<Shape, false>(call, reader, block, queries, block.slides, keys, weights[0], parts);
    add_gradients<T, 1, N, D>(dv, weights, grads);
    fill_zero_tile(dp);
    multiply_rows_of<T, N, D>(dp, values, grads);
    score_gradients(call, weights[0], dp, queries, parts, ds[0]);
    add_gradients<T, 1, N, D>(dk, ds, queries.rows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = Shape::first_row() + 8 * half + lane_row();
        const bool present = key < block.valid;  // e^-lse of a key that is not there can be infinite
        auto* row = reinterpret_cast<char*>(Shape::rows(4) + key * Shape::kGradientPitch);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float2 pair{ds[0][n][2 * half], ds[0][n][2 * half + 1]};
            store_columns<T>(row, 8 * n + lane_column(), present ? pair : float2{0, 0});
        }
    }
    __syncthreads();
    multiply_stored<T, Shape::kSegment / 8, D, Shape::kGradientPitch>(
        dq[0], Shape::rows(4) + Shape::first_row(), Shape::rows(2));
}

// Grid: (segments × splits, Hkv); where rows have ids, a segment more, whose readers are those that read
// none.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, resident_blocks(Shape::kThreads))
    short_kernel(const __grid_constant__ Call call, const __grid_constant__ Saved saved,
                 const __grid_constant__ Tokens target, const __grid_constant__ KeyGradients grads) {
    using T = typename Shape::T;
    using S = typename Shape::S;
    constexpr int D = Shape::D;
    const SegmentSet& set = call.sets[0];
    const int group = call.heads / call.kv_heads, kv_head = blockIdx.y;
    const int unit = blockIdx.x / grads.splits, split = blockIdx.x % grads.splits;
    const bool exists = unit < set.count;
    const int segment = minimum(unit, set.count - 1);
    KeyBlock block{0,
                   0,
                   exists ? valid_span_of(set, segment).count : 0,
                   exists ? set.size : 0,
                   0,
                   {nullptr, 0},
                   false,
                   slides(call, 0),
                   nullptr};
    const Chain chain = chain_of(set, segment, kv_head, 0, sizeof(S));
    using Copy = TileCopy<T, Shape::kSegment, D, Shape::kThreads>;
    const Copy keys(chain.key, set.key.token, block.valid, call.head_dim, set.is_float32);
    const Copy values(chain.value, set.value.token, block.valid, call.head_dim, set.is_float32);
    keys.load(Shape::rows(2), 0, block.mask, set.is_float32);
    values.load(Shape::rows(3), 0, block.mask, set.is_float32);
    cp_async_commit();
    int first_reader = 0, readers = call.rows;
    if (set.ids.data != nullptr) {
        first_reader = set.starts[unit];
        readers = set.starts[unit + 1] - first_reader;
    }
    const int pairs = readers * group, tiles = ceil_div(call.max_queries, Shape::kQueries);

    float dk[1][D / 8][4], dv[1][D / 8][4];
    fill_zero(dk);
    fill_zero(dv);
#pragma unroll 1
    for (int item = split; item < pairs * tiles; item += grads.splits) {
        const int pair = item % pairs, head = kv_head * group + pair % group;
        int row = first_reader + pair / group;
        if (set.ids.data != nullptr) row = set.order[row];
        const int first = (tiles - 1 - item / pairs) * Shape::kQueries;
        const QueryTile tile{row, first, call.max_queries, first};
        const int offset = offset_of(call, row);
        __syncthreads();  // the last tile has been read
        load_tile_of_reader<Shape>(call, saved, tile, head);
        float dq[1][D / 8][4];
        fill_zero(dq);
        if (block.valid > 0) {
            const int begin = block.slides ? -windowed_length(call, row, 0) : 0;
            add_segment<Shape>(call, {row, head, offset, begin, call.max_queries}, block, first, dk, dv, dq);
        }
        RowLevels<1> levels;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int place = Shape::first_row() + 8 * half + lane_row();
            levels.level[0][half] = *QueryColumns<T, D>::level_of(Shape::rows(0), place);
            levels.delta[0][half] = *QueryColumns<T, D>::delta_of(Shape::rows(0), place);
        }
        const Rows<1> rows = rows_of<Shape>(tile, head, offset);
        const typename Shape::Queries queries{Shape::rows(0) + Shape::first_row() * kPitch<T, D>};
        const typename Shape::Queries output_grads{Shape::rows(1) + Shape::first_row() * kPitch<T, D>};
        const int last = minimum(first + Shape::kQueries, call.max_queries) - 1;
        const auto own = walk_of_row<Shape::kKeys>(call, call.num_sets, row, kv_head, first + offset,
                                                   last + offset, sizeof(S));
        KeyTile key_tile = own.tile;
        walk<Shape, true>(own.list, own.source, [&](int start, const S* keys, auto edge) {
            key_tile.start = start;
            descend_tile<Shape, false>(call, queries, output_grads, rows, levels, key_tile, edge, keys, dq);
        });
        for_each_gradient_row<T, 1, D>(dq, [&](int of_warp, const auto& columns) {
            const int place = first + Shape::first_row() + of_warp;
            if (place > last) return;
            char* to = static_cast<char*>(target.data) + offset_bytes(target, row, head, place, sizeof(S));
            store_row<S>(to, call.head_dim, call.scale, columns);
        });
    }
    cp_async_wait<0>();  // a block without a tile has not waited for its segment
    if (grads.key.data != nullptr) {
        store_gradients<T, D>(call, block, grads.key, grads.key_parts, split * grads.key_part, segment,
                              kv_head, set.is_float32, dk, call.scale);
    }
    if (grads.value.data != nullptr) {
        store_gradients<T, D>(call, block, grads.value, grads.value_parts, split * grads.value_part, segment,
                              kv_head, set.is_float32, dv, 1);
    }
}

template <typename T>
int backward_short(const Call& call, const Saved& saved, const Tokens& target, const KeyGradients& grads,
                   void* stream) {
    return with_head_dim<T>(call.head_dim, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        if constexpr (kIsHalf<T> && D <= kShortHeadDim) {
            // As many own keys as leave registers, and shared memory for two blocks on sm_80.
            using Shape = ShortShape<T, D, D == 96 ? 16 : D == 64 ? 48 : 32>;
            const int units = call.sets[0].count + (call.sets[0].ids.data != nullptr);
            const dim3 grid(units * grads.splits, call.kv_heads), block(Shape::kThreads);
            return PREFIX_FAST_LAUNCH(short_kernel<Shape>, grid, block, Shape::kSharedBytes,
                                      static_cast<cudaStream_t>(stream), call, saved, target, grads);
        } else {
            return cudaErrorInvalidValue;
        }
    });
}

// Whether the kernel is compiled for calls of this head dim.
template <typename T>
bool serves(int head_dim) {
    return with_head_dim<T>(
               head_dim, [](auto dim) { return kIsHalf<T> && decltype(dim)::value <= kShortHeadDim; }) == 1;
}

}  // namespace prefix_fast::cuda

#define PREFIX_FAST_DEFINE(name, type)                                                          \
    PREFIX_FAST_EXPORT bool prefix_fast_short_serves_##name(int head_dim) {                     \
        return prefix_fast::cuda::serves<type>(head_dim);                                       \
    }                                                                                           \
    PREFIX_FAST_EXPORT int prefix_fast_backward_short_##name(                                   \
        const prefix_fast::cuda::Call* call, const prefix_fast::cuda::Saved* saved,             \
        const prefix_fast::cuda::Tokens* target, const prefix_fast::cuda::KeyGradients* grads,  \
        void* stream) {                                                                         \
        return prefix_fast::cuda::backward_short<type>(*call, *saved, *target, *grads, stream); \
    }
PREFIX_FAST_TYPES(PREFIX_FAST_DEFINE)
