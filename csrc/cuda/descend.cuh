// The step of the queries' gradient, with queries as rows: one tile of keys.
//
//     p_ij = e^{s_ij - lse_i}      dq_i += Σ_j p_ij (do_i·v_j - δ_i) k_j      (scaled where it is stored)
#pragma once

#include "walk.cuh"

namespace prefix_fast::cuda {

// lse and δ of this thread's rows.
template <int M>
struct RowLevels {
    float level[M][2], delta[M][2];
};

// Adds Σ_j ds_ij k_j over one tile of keys.
template <typename Shape, bool kOptions, typename Edge>
__device__ inline void descend_tile(const Call& call, const typename Shape::Queries& queries,
                                    const typename Shape::Queries& grads, const Rows<Shape::M>& rows,
                                    const RowLevels<Shape::M>& levels, const KeyTile& tile, Edge edge,
                                    const typename Shape::S* keys, float (&sums)[Shape::M][Shape::D / 8][4]) {
    using T = typename Shape::T;
    constexpr int M = Shape::M, N = Shape::kKeys / 8, D = Shape::D;
    float scores[M][N][4], dp[M][N][4], slopes[M][kOptions ? N : 1][4];
    fill_zero(scores);
    multiply_transposed<T, M, N, D>(scores, queries, keys);
    fill_zero(dp);
    multiply_transposed<T, M, N, D>(dp, grads, keys + Shape::kTileElements);
    const float unit = unit_of<kOptions>(call.scale);
    if constexpr (kOptions) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            if (call.softcap != 0) {
                apply_softcap(scores[m], slopes[m], call.scale, call.softcap);
            } else {
                apply_scale(scores[m], call.scale);
            }
        }
        if (call.sets[tile.set].bias.data != nullptr) add_bias(scores, call.sets[tile.set].bias, rows, tile);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[m][n][i] = exponential<kOptions>(scores[m][n][i], unit, levels.level[m][i / 2]);
                if (kOptions && call.softcap != 0) scores[m][n][i] *= slopes[m][n][i];
            }
        }
    }
    if (edge) hide(scores, 0, rows, tile, call.window);
    if (kOptions && call.seed != nullptr) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            for_each_kept<N>(call, rows.row[m], rows.head[m], rows.token[m], tile,
                             [&](int n, int half, int c, bool kept) {
                                 float& value = dp[m][n][2 * half + c];
                                 value = kept ? value * call.inverse_share : 0;
                             });
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[m][n][i] *= dp[m][n][i] - levels.delta[m][i / 2];
            }
        }
    }
    add_gradients<T, M, N, D>(sums, scores, keys);
}

}  // namespace prefix_fast::cuda
