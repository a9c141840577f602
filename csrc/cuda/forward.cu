// Forward, row-major: one pass over a row's segments and its own tokens, without a merge. Training and
// prefill.
//
//     s_ij = scale · q_i·k_j (softcapped, plus bias, -inf where hidden)      lse_i = log Σ_j e^{s_ij}
//     out_i = Σ_j e^{s_ij - lse_i} v_j
//
// q [Tq, D] of one row and head, k and v [keys, D] of each segment of its chain, the own tokens last;
// float16, bfloat16 or float32, segments also float32 beside half precision. Products, sums, maximum and lse
// are float32; the weights are rounded to the queries' type for their product with v. The prefix is read in
// place by every row: nothing is repeated or concatenated. A query that sees no key gets 0 and -inf.
#include "attend.cuh"
#include "kernels.cuh"
#include "launch.cuh"

namespace prefix_fast::cuda {

template <typename T, int D>
struct ForwardShapeOf;
template <typename T>
struct ForwardShapeOf<T, 64>
    : ForwardShape<T, 64, std::is_same_v<T, float> ? 1 : 2, 4, 32, kIsHalf<T> ? 3 : 2> {};
template <typename T>
struct ForwardShapeOf<T, 80> : ForwardShape<T, 80, 1, kIsHalf<T> ? 8 : 4, kIsHalf<T> ? 64 : 32, 2> {};
template <typename T>
struct ForwardShapeOf<T, 96> : ForwardShape<T, 96, 1, kIsHalf<T> ? 8 : 4, kIsHalf<T> ? 64 : 32, 2> {};
template <typename T>
struct ForwardShapeOf<T, 128>
    : ForwardShape<T, 128, std::is_same_v<T, Tf32> ? 2 : 1, kIsHalf<T> ? 8 : 4, kIsHalf<T> ? 64 : 16, 2> {};
template <typename T>
struct ForwardShapeOf<T, 256> : ForwardShape<T, 256, 1, kIsHalf<T> ? 4 : 2, 16, kIsHalf<T> ? 3 : 2> {};

// Normalises the sums and writes out and lse of this thread's rows.
template <typename Shape, bool kOptions>
__device__ inline void store_results(const Call& call, const Results& results, const QueryTile& tile,
                                     int head, const State<Shape::M>& state,
                                     const float (&sums)[Shape::M][Shape::D / 8][4]) {
    const float sink =
        call.sinks != nullptr ? read_float(call.sinks, head * call.sinks_stride, call.sinks_dtype) : 0;
    const float kept_share = kOptions && call.seed != nullptr ? call.kept_share : 1;
#pragma unroll
    for (int m = 0; m < Shape::M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = sum_of_row(state.total[m][half]);
            const Normal normal =
                normal_of<kOptions>(state.maximum[m][half], total, call.sinks != nullptr, sink, kept_share);
            const int place = Shape::first_row() + 16 * m + 8 * half + lane_row();
            if (tile.first + place >= tile.count) continue;
            const int64_t token = tile.token + place;
            char* row = static_cast<char*>(results.out.data) +
                        offset_bytes(results.out, tile.row, head, token, sizeof(typename Shape::S));
            store_row<typename Shape::S>(row, call.head_dim, normal.inverse, [&](const auto& each) {
                for_each_columns<typename Shape::T, Shape::D>(sums[m], half, each);
            });
            if (lane() % 4 == 0) {
                const Levels& lse = results.lse;
                lse.data[tile.row * lse.unit + head * lse.head + token * lse.token] = normal.lse;
            }
        }
    }
}

// Grid: (tiles of the queries of all rows, H).
template <typename Shape, bool kOptions>
__global__ void __launch_bounds__(Shape::kThreads, resident_blocks(Shape::kThreads))
    forward_kernel(const __grid_constant__ Call call, const __grid_constant__ Results results) {
    using S = typename Shape::S;
    const QueryTile query = query_tile(call, blockIdx.x, Shape::kQueries);
    if (query.first >= query.count) return;
    const int head = blockIdx.y, kv_head = head / (call.heads / call.kv_heads);
    const int offset = offset_of(call, query.row);
    const Rows<Shape::M> rows = rows_of<Shape>(query, head, offset);
    const auto queries =
        load_tile_rows<Shape>(call, call.query, query, head, sign_of<typename Shape::T>(call.scale), 0);
    const int last = minimum(query.first + Shape::kQueries, query.count) - 1;

    State<Shape::M> state;
    float sums[Shape::M][Shape::D / 8][4];
    state.clear();
    fill_zero(sums);
#pragma unroll 1
    for (int s = 0; s <= call.num_sets; ++s) {
        const auto of_set = walk_of_row<Shape::kKeys>(call, s, query.row, kv_head, query.first + offset,
                                                      last + offset, sizeof(S));
        attend<Shape, kOptions, !kOptions>(call, queries, rows, of_set.list, of_set.source, of_set.tile,
                                           positive_scale(call), state, sums);
    }
    store_results<Shape, kOptions>(call, results, query, head, state, sums);
}

template <typename T>
int forward(const Call& call, const Results& results, void* stream) {
    return with_head_dim<T>(call.head_dim, [&](auto dim) {
        using Shape = ForwardShapeOf<T, decltype(dim)::value>;
        const dim3 grid(query_tiles(call, Shape::kQueries), call.heads), block(Shape::kThreads);
        const auto run = [&](auto kernel) {
            return PREFIX_FAST_LAUNCH(kernel, grid, block, Shape::kSharedBytes,
                                      static_cast<cudaStream_t>(stream), call, results);
        };
        return has_options(call) ? run(forward_kernel<Shape, true>) : run(forward_kernel<Shape, false>);
    });
}

}  // namespace prefix_fast::cuda

#define PREFIX_FAST_DEFINE(name, type)                                                                  \
    PREFIX_FAST_EXPORT int prefix_fast_forward_##name(                                                  \
        const prefix_fast::cuda::Call* call, const prefix_fast::cuda::Results* results, void* stream) { \
        return prefix_fast::cuda::forward<type>(*call, *results, stream);                               \
    }
PREFIX_FAST_TYPES(PREFIX_FAST_DEFINE)
