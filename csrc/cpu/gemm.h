// The two register-tiled products of which all kernels are made. No operand is ever packed.
//
// Lane-major operands are groups of 16 lanes: X[g][r][16], `group stride` floats apart.
//
//   product_rows   C[g][r][lane] (+)= sum_k A(r, k) B[g][k][lane]       scores, dP (k = head dim); O, dQ (k =
//   keys) product_lanes  C[r][d] (+)= sum_{g, lane} A[g][r][lane] B[g * 16 + lane][d]                   dV,
//   dK
//
// Elements are float32, or pairs of bfloat16 that the arithmetic multiplies and adds in one step: then two
// consecutive k (or lanes, in product_lanes) share an element, and all sums are float32 still.
//
// A(r, k) is read in place, element by element, as a broadcast: keys and values need no copy and no
// transposition. Sums run over k in ascending order, whatever the tile: a lane's bits do not depend on how
// many lanes there are.
#pragma once

#include <cstdint>

#include "ahead.h"
#include "simd.h"

namespace prefix_fast {

constexpr int kGroup = 16;                // lanes of a group
constexpr int kGroups = 4;                // groups of a block
constexpr int kLanes = kGroup * kGroups;  // queries of a block

constexpr int max_rows(int vectors) {
    if (kWidth == 16) return vectors == 1 ? 12 : vectors == 4 ? 6 : 8;
    return 12 / vectors;
}

// How elements are multiplied; kPack values share an element. `element` is one of A, for a strip of kStrip
// vectors of columns: four groups of one vector (32 registers), or one group of two or four (16).
struct Singles {
    static constexpr int kPack = 1, kStrip = kWidth == 16 ? 4 : kGroup / kWidth;
    static PF_INLINE Vec element(const float* a) { return broadcast(*a); }
    static PF_INLINE Vec fma(Vec a, Vec b, Vec c) { return prefix_fast::fma(a, b, c); }
};

#if defined(__AVX512BF16__)
constexpr bool kNativeBFloat16 = true;
// Strips of one vector, A broadcast by the multiplication itself (gcc 12 does not fold it): 93 to 100 % of
// the peak on Zen 4. A broadcast of its own competes for the multiplier's ports, and strips of four stay at
// 90 %.
struct Pairs {
    static constexpr int kPack = 2, kStrip = 1;
    static PF_INLINE const float* element(const float* a) { return a; }
    static PF_INLINE Vec fma(const float* a, Vec b, Vec c) {
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
        return c;
    }
    static PF_INLINE Vec fma(Vec a, Vec b, Vec c) {
        return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
};
#else
constexpr bool kNativeBFloat16 = false;
#endif

// What becomes of a finished vector of sums.
struct Assign {
    PF_INLINE void operator()(float* at, Vec sum) const { store(at, sum); }
};
struct Add {
    PF_INLINE void operator()(float* at, Vec sum) const { store(at, load(at) + sum); }
};
struct AssignScaled {
    float factor;
    PF_INLINE void operator()(float* at, Vec sum) const { store(at, broadcast(factor) * sum); }
};

// Which index of A is contiguous.
enum class Contiguous { kInner, kRows };

struct Matrix {
    const float* data;
    int64_t stride;          // of the index that is not contiguous
    bool fresh = false;      // read for the first time, in place: worth a prefetch
    Ahead* ahead = nullptr;  // what to ask for meanwhile
};

template <class Arithmetic, int R, int V, Contiguous Layout, bool Asks, class Write>
PF_INLINE void rows_tile(int64_t inner, const float* a, int64_t a_stride, const float* b, float* c,
                         int64_t b_step, int64_t c_step, Requests ahead, Write write) {
    Vec sum[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
    }
    for (int64_t k = 0; k < inner; ++k) {
        if constexpr (Asks) ahead.ask();
        Vec column[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) column[v] = load(b + k * kGroup + v * b_step);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const auto x =
                Arithmetic::element(a + (Layout == Contiguous::kInner ? r * a_stride + k : k * a_stride + r));
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[r][v] = Arithmetic::fma(x, column[v], sum[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) write(c + r * kGroup + v * c_step, sum[r][v]);
    }
}

template <class Arithmetic, int R, int V, class Write>
PF_INLINE void lanes_tile(int groups, const float* a, int64_t a_group, const float* b, int64_t b_stride,
                          float* c, int64_t c_stride, Write write) {
    constexpr int kElements = kGroup / Arithmetic::kPack;
    Vec sum[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v += 16 / kWidth) __builtin_prefetch(c + r * c_stride + v * kWidth, 1, 3);
    }
    for (int g = 0; g < groups; ++g) {
        const float* x = a + g * a_group;
        for (int lane = 0; lane < kElements; ++lane, b += b_stride) {
            Vec column[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) column[v] = load(b + v * kWidth);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const auto weight = Arithmetic::element(x + r * kElements + lane);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) sum[r][v] = Arithmetic::fma(weight, column[v], sum[r][v]);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) write(c + r * c_stride + v * kWidth, sum[r][v]);
    }
}

PF_INLINE void prefetch_row(const float* row, int64_t count) {
    for (int64_t at = 0; at < count; at += 16) {
        __builtin_prefetch(row + at, 0, 2);
        asm volatile("");  // gcc 12 drops loops that only prefetch
    }
}

// The rows of the tile after this one, if it is as high.
PF_INLINE void prefetch_next_rows(const float* a, int64_t stride, int height, int64_t inner) {
    for (int r = height; r < 2 * height; ++r) prefetch_row(a + r * stride, inner);
}

// Call f<R>(first row) over `rows` rows in tiles of nearly equal height, at most Max.
template <int Max, class F>
PF_INLINE void for_row_tiles(int64_t rows, F&& f) {
    int64_t tiles = (rows + Max - 1) / Max;
    for (int64_t row = 0; row < rows; --tiles) {
        const int64_t height = (rows - row + tiles - 1) / tiles;
        f(row, static_cast<int>(height));
        row += height;
    }
}

template <int R, class F>
PF_INLINE void with_height(int height, F&& f) {
    if (height == R) {
        f(std::integral_constant<int, R>{});
    } else if constexpr (R > 1) {
        with_height<R - 1>(height, f);
    }
}

// Columns [0, V * kWidth) of B; `first`: nobody has read these rows of A for this product yet.
template <class Arithmetic, int V, Contiguous Layout, class Write>
PF_OWN_REGISTERS void rows_strip(int64_t rows, int64_t inner, Matrix a, const float* b, float* c,
                                 int64_t b_step, int64_t c_step, bool first, Write write) {
    for_row_tiles<max_rows(V)>(rows, [&](int64_t row, int height) {
        const float* from = a.data + (Layout == Contiguous::kInner ? row * a.stride : row);
        if (Layout == Contiguous::kInner && first) prefetch_next_rows(from, a.stride, height, inner);
        const Requests ahead = a.ahead == nullptr ? Requests{} : a.ahead->take(inner, inner * height * V);
        with_height<max_rows(V)>(height, [&](auto r) {
            const auto tile = [&](auto asks) {
                rows_tile<Arithmetic, decltype(r)::value, V, Layout, decltype(asks)::value>(
                    inner, from, a.stride, b, c + row * kGroup, b_step, c_step, ahead, write);
            };
            ahead.data != nullptr ? tile(std::true_type{}) : tile(std::false_type{});
        });
    });
}

template <class Arithmetic, Contiguous Layout, class Write>
inline void product_rows(int64_t rows, int64_t inner, int groups, Matrix a, const float* b, int64_t b_group,
                         float* c, int64_t c_group, Write write) {
    constexpr int kStrip = Arithmetic::kStrip;
    if constexpr (kStrip * kWidth > kGroup) {
        const auto strip = [&](auto v) {
            rows_strip<Arithmetic, decltype(v)::value, Layout>(rows, inner, a, b, c, b_group, c_group,
                                                               a.fresh, write);
        };
        if (groups == 1) return strip(std::integral_constant<int, 1>{});
        if (groups == 2) return strip(std::integral_constant<int, 2>{});
        if (groups == 3) return strip(std::integral_constant<int, 3>{});
        strip(std::integral_constant<int, 4>{});
    } else {
        for (int lane = 0; lane < groups * kGroup; lane += kStrip * kWidth) {
            const int64_t g = lane / kGroup, v = lane % kGroup;
            rows_strip<Arithmetic, kStrip, Layout>(rows, inner, a, b + g * b_group + v, c + g * c_group + v,
                                                   kWidth, kWidth, a.fresh && lane == 0, write);
        }
    }
}

template <class Arithmetic, int V, class Write>
PF_OWN_REGISTERS void lanes_strip(int64_t rows, int groups, const float* a, int64_t a_group, const float* b,
                                  int64_t b_stride, float* c, int64_t c_stride, Write write) {
    for_row_tiles<max_rows(V)>(rows, [&](int64_t row, int height) {
        with_height<max_rows(V)>(height, [&](auto r) {
            lanes_tile<Arithmetic, decltype(r)::value, V>(groups, a + row * (kGroup / Arithmetic::kPack),
                                                          a_group, b, b_stride, c + row * c_stride, c_stride,
                                                          write);
        });
    });
}

// `columns` is a multiple of 16.
template <class Arithmetic, class Write>
inline void product_lanes(int64_t rows, int64_t columns, int groups, const float* a, int64_t a_group,
                          const float* b, int64_t b_stride, float* c, int64_t c_stride, Write write) {
    constexpr int kStrip = Arithmetic::kStrip;
    int64_t d = 0;
    for (; d + kStrip * kWidth <= columns; d += kStrip * kWidth) {
        lanes_strip<Arithmetic, kStrip>(rows, groups, a, a_group, b + d, b_stride, c + d, c_stride, write);
    }
    if constexpr (kStrip * kWidth > kGroup) {
        const int rest = static_cast<int>((columns - d) / kWidth);
        if (rest == 1)
            lanes_strip<Arithmetic, 1>(rows, groups, a, a_group, b + d, b_stride, c + d, c_stride, write);
        if (rest == 2)
            lanes_strip<Arithmetic, 2>(rows, groups, a, a_group, b + d, b_stride, c + d, c_stride, write);
        if (rest == 3)
            lanes_strip<Arithmetic, 3>(rows, groups, a, a_group, b + d, b_stride, c + d, c_stride, write);
    }
}

}  // namespace prefix_fast
