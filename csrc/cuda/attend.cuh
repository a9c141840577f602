// What both forward kernels do: keys under the online softmax.
//
//     lse_i = log Σ_j e^{s_ij}      out_i = Σ_j e^{s_ij - lse_i} v_j
//
// The sums are float32 in registers, relative to the maximum so far.
#pragma once

#include "walk.cuh"

namespace prefix_fast::cuda {

// Adds one tile of keys to the state and the sums of this warp's rows. edge: some key of it may be hidden.
template <typename Shape, bool kOptions, typename Edge>
__device__ inline void attend_tile(const Call& call, const typename Shape::Queries& queries,
                                   const Rows<Shape::M>& rows, const KeyTile& tile, Edge edge,
                                   const typename Shape::S* keys, float scale, State<Shape::M>& state,
                                   float (&sums)[Shape::M][Shape::D / 8][4]) {
    using T = typename Shape::T;
    constexpr int M = Shape::M, N = Shape::kKeysOfWarp / 8, D = Shape::D;
    float scores[M][N][4];
    fill_zero(scores);
    multiply_transposed<T, M, N, D>(scores, queries, keys);
    if (kOptions) natural_logits(scores, call, call.sets[tile.set].bias, rows, tile, scale);
    if (edge) hide(scores, -infinity(), rows, tile, call.window);
    online_softmax_update<kOptions>(scores, unit_of<kOptions>(scale), state, sums);
    if (kOptions && call.seed != nullptr) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            for_each_kept<N>(call, rows.row[m], rows.head[m], rows.token[m], tile,
                             [&](int n, int half, int c, bool kept) {
                                 if (!kept) scores[m][n][2 * half + c] = 0;
                             });
        }
    }
    multiply_weights<T, M, N, D>(sums, scores, keys + Shape::kTileElements);
}

// Adds the tiles of a list.
template <typename Shape, bool kOptions, bool kTwoLoops>
__device__ inline void attend(const Call& call, const typename Shape::Queries& queries,
                              const Rows<Shape::M>& rows, const TileList<Shape::kKeys>& list,
                              const Source& source, KeyTile tile, float scale, State<Shape::M>& state,
                              float (&sums)[Shape::M][Shape::D / 8][4]) {
    walk<Shape, kTwoLoops>(list, source, [&](int start, const typename Shape::S* keys, auto edge) {
        tile.start = start + Shape::first_key();
        attend_tile<Shape, kOptions>(call, queries, rows, tile, edge,
                                     keys + Shape::first_key() * kPitch<typename Shape::T, Shape::D>, scale,
                                     state, sums);
    });
}

}  // namespace prefix_fast::cuda
