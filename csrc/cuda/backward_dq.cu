// Gradient of the queries, row-major, and the small kernel that prepares both halves of the backward pass.
//
//     δ_i = Σ_d do_i·o_i - g_i               p_ij = e^{s_ij - lse_i}
//     ds_ij = p_ij (do_i·v_j - δ_i)          dq_i = scale Σ_j ds_ij k_j
//
// lse is that of the whole chain, so each segment's part is independent of the others; g is the gradient of
// lse. δ and lse are float32 in a scratch whose rows are padded to whole tiles: there, and for queries that
// see no key, lse is +inf and δ is 0, so p is 0 without a mask. dq is float32 in registers and scaled last; p
// and do·v are recomputed.
#include "descend.cuh"
#include "kernels.cuh"
#include "launch.cuh"

namespace prefix_fast::cuda {

constexpr int kPrepareThreads = 128;
constexpr int kLanesOfRow = 8;

// Σ of the products of 16 bytes of two rows, the second's as `factors_of` made them.
template <typename T>
__device__ inline float dot_chunk(uint4 a, uint4 b) {
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (kIsHalf<T>) {
            const float2 u = unpacked<T>(x[i]), v = unpacked<T>(y[i]);
            sum += u.x * v.x + u.y * v.y;
        } else {
            sum += as_float(x[i]) * (std::is_same_v<T, Tf32> ? tf32_of(y[i]) : as_float(y[i]));
        }
    }
    return sum;
}

// Writes δ and lse, of base 2 without options and natural with them, to the padded scratch. Grid: (query
// tiles, H).
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ Call call, const __grid_constant__ Saved saved, bool natural) {
    const QueryTile tile = query_tile(call, blockIdx.x, kScratchTile);
    if (tile.first >= tile.count) return;
    const int head = blockIdx.y, bytes = sizeof(Storage<T>);
    const auto* out =
        static_cast<const char*>(saved.out.data) + offset_bytes(saved.out, tile.row, head, tile.token, bytes);
    const auto* grad = static_cast<const char*>(saved.grad_out.data) +
                       offset_bytes(saved.grad_out, tile.row, head, tile.token, bytes);
    const int64_t scratch = head * saved.capacity + scratch_start(call, tile.row) + tile.first;
    for (int place = threadIdx.x / kLanesOfRow; place < kScratchTile;
         place += kPrepareThreads / kLanesOfRow) {
        const bool exists = tile.first + place < tile.count;
        float delta = 0;
        for (int d = threadIdx.x % kLanesOfRow * kChunk<T>; exists && d < call.head_dim;
             d += kLanesOfRow * kChunk<T>) {
            // As the products will read it: where a query sees one key, do·v and δ cancel.
            const uint4 of_grad =
                factors_of<T>(load_global_16(grad + (place * saved.grad_out.token + d) * bytes));
            delta += dot_chunk<T>(load_global_16(out + (place * saved.out.token + d) * bytes), of_grad);
        }
#pragma unroll
        for (int step = 1; step < kLanesOfRow; step *= 2) delta += __shfl_xor_sync(0xFFFFFFFFu, delta, step);
        if (threadIdx.x % kLanesOfRow != 0) continue;
        float level = infinity();
        if (exists) {
            const Levels &lse = saved.lse, &g = saved.grad_lse;
            const int64_t token = tile.token + place;
            const float natural_level = lse.data[tile.row * lse.unit + head * lse.head + token * lse.token];
            if (natural_level != -infinity()) level = natural ? natural_level : natural_level * kLog2e;
            if (g.data != nullptr) delta -= g.data[tile.row * g.unit + head * g.head + token * g.token];
        }
        saved.levels[scratch + place] = level;
        saved.deltas[scratch + place] = level == infinity() ? 0 : delta;
    }
}

// As a forward kernel's, with two tiles of rows: queries and gradients of the output.
template <typename Forward>
struct DqShape : Forward {
    static constexpr int kSharedBytes = Forward::kPipelineBytes + 2 * Forward::kQueryBytes;
};
template <typename T, int D>
struct DqShapeOf;
template <typename T>
struct DqShapeOf<T, 64> : DqShape<ForwardShape<T, 64, std::is_same_v<T, Tf32> ? 2 : 1, kIsHalf<T> ? 8 : 4,
                                               kIsHalf<T>                ? 64
                                               : std::is_same_v<T, Tf32> ? 16
                                                                         : 32,
                                               2>> {};
template <typename T>
struct DqShapeOf<T, 80> : DqShape<ForwardShape<T, 80, 1, kIsHalf<T> ? 8 : 4, kIsHalf<T> ? 32 : 16, 2>> {};
template <typename T>
struct DqShapeOf<T, 96> : DqShape<ForwardShape<T, 96, 1, kIsHalf<T> ? 8 : 4, kIsHalf<T> ? 32 : 16, 2>> {};
template <typename T>
struct DqShapeOf<T, 128> : DqShape<ForwardShape<T, 128, 1, kIsHalf<T> ? 8 : 4, kIsHalf<T> ? 32 : 16, 2>> {};
template <typename T>
struct DqShapeOf<T, 256> : DqShape<ForwardShape<T, 256, 1, kIsHalf<T> ? 4 : 2, kIsHalf<T> ? 16 : 8, 2>> {};

// Grid: (tiles of the queries of all rows, H).
template <typename Shape, bool kOptions>
__global__ void __launch_bounds__(Shape::kThreads, resident_blocks(Shape::kThreads))
    dq_kernel(const __grid_constant__ Call call, const __grid_constant__ Saved saved,
              const __grid_constant__ Tokens target) {
    using T = typename Shape::T;
    using S = typename Shape::S;
    constexpr int M = Shape::M, D = Shape::D;
    const QueryTile query = query_tile(call, blockIdx.x, Shape::kQueries);
    if (query.first >= query.count) return;
    const int head = blockIdx.y, kv_head = head / (call.heads / call.kv_heads);
    const int offset = offset_of(call, query.row);
    const Rows<M> rows = rows_of<Shape>(query, head, offset);
    const Sign plain{0xFFFFFFFFu, 0};
    const auto queries = load_tile_rows<Shape>(call, call.query, query, head, plain, 0);
    const auto grads = load_tile_rows<Shape>(call, saved.grad_out, query, head, plain, 1);
    const int64_t scratch = head * saved.capacity + scratch_start(call, query.row) + query.first;
    RowLevels<M> levels;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int place = Shape::first_row() + 16 * m + 8 * half + lane_row();
            levels.level[m][half] = saved.levels[scratch + place];
            levels.delta[m][half] = saved.deltas[scratch + place];
        }
    }
    const int last = minimum(query.first + Shape::kQueries, query.count) - 1;

    float sums[M][D / 8][4];
    fill_zero(sums);
#pragma unroll 1
    for (int s = 0; s <= call.num_sets; ++s) {
        const auto of_set = walk_of_row<Shape::kKeys>(call, s, query.row, kv_head, query.first + offset,
                                                      last + offset, sizeof(S));
        KeyTile tile = of_set.tile;
        walk<Shape, !kOptions>(of_set.list, of_set.source, [&](int start, const S* keys, auto edge) {
            tile.start = start;
            descend_tile<Shape, kOptions>(call, queries, grads, rows, levels, tile, edge, keys, sums);
        });
    }
    // Asked for again: what only the stores need would take registers from the loops.
    const Span span = span_of(query.row, call.cu_seqlens_q, call.max_queries);
    for_each_gradient_row<T, M, D>(sums, [&](int of_warp, const auto& columns) {
        const int place = query.first + Shape::first_row() + of_warp;
        if (place >= span.count) return;
        char* row = static_cast<char*>(target.data) +
                    offset_bytes(target, query.row, head, span.first + place, sizeof(S));
        store_row<S>(row, call.head_dim, call.scale, columns);
    });
}

template <typename T>
int prepare(const Call& call, const Saved& saved, void* stream) {
    const dim3 grid(query_tiles(call, kScratchTile), call.heads), block(kPrepareThreads);
    return PREFIX_FAST_LAUNCH(prepare_kernel<T>, grid, block, 0, static_cast<cudaStream_t>(stream), call,
                              saved, has_options(call));
}

template <typename T>
int backward_queries(const Call& call, const Saved& saved, const Tokens& target, void* stream) {
    return with_head_dim<T>(call.head_dim, [&](auto dim) {
        using Shape = DqShapeOf<T, decltype(dim)::value>;
        const dim3 grid(query_tiles(call, Shape::kQueries), call.heads), block(Shape::kThreads);
        const auto run = [&](auto kernel) {
            return PREFIX_FAST_LAUNCH(kernel, grid, block, Shape::kSharedBytes,
                                      static_cast<cudaStream_t>(stream), call, saved, target);
        };
        return has_options(call) ? run(dq_kernel<Shape, true>) : run(dq_kernel<Shape, false>);
    });
}

}  // namespace prefix_fast::cuda

#define PREFIX_FAST_DEFINE(name, type)                                                                       \
    PREFIX_FAST_EXPORT int prefix_fast_prepare_##name(const prefix_fast::cuda::Call* call,                   \
                                                      const prefix_fast::cuda::Saved* saved, void* stream) { \
        return prefix_fast::cuda::prepare<type>(*call, *saved, stream);                                      \
    }                                                                                                        \
    PREFIX_FAST_EXPORT int prefix_fast_backward_queries_##name(                                              \
        const prefix_fast::cuda::Call* call, const prefix_fast::cuda::Saved* saved,                          \
        const prefix_fast::cuda::Tokens* target, void* stream) {                                             \
        return prefix_fast::cuda::backward_queries<type>(*call, *saved, *target, stream);                    \
    }
PREFIX_FAST_TYPES(PREFIX_FAST_DEFINE)
