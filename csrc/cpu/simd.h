// One float vector of the widest kind that this build may use, and the few operations that the kernels need.
//
// The same sources are compiled once per instruction set: AVX-512 (16 lanes), AVX2 + FMA (8), and a generic
// level of compiler vectors (4: SSE2, NEON). Operations on vectors are lane by lane throughout: a lane's
// result never depends on its neighbours, which is what makes a row's bits independent of the batch around
// it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PF_INLINE inline __attribute__((always_inline))
// Of loops whose registers must not be shared with a caller's variables.
#define PF_OWN_REGISTERS __attribute__((noinline))

namespace prefix_fast {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecI __attribute__((vector_size(4 * kWidth)));

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

PF_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

PF_INLINE void store(float* p, Vec v) {
    std::memcpy(p, &v, sizeof(v));
}

PF_INLINE VecI load_int(const int32_t* p) {
    VecI v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

PF_INLINE Vec broadcast(float x) {
#if defined(__AVX512F__)
    return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Vec)_mm256_set1_ps(x);
#else
    return Vec{x, x, x, x};
#endif
}

PF_INLINE VecI broadcast_int(int32_t x) {
    return x - VecI{};
}

// a * b + c, fused wherever the hardware has it.
PF_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// The larger operand; b where either is NaN (the rule of x86's maxps), so max(bound, x) keeps a NaN of x.
PF_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);  // the plain form warns in gcc 12
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// The smaller operand; b where either is NaN.
PF_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

PF_INLINE Vec select(VecI condition, Vec yes, Vec no) {
    return condition ? yes : no;
}

PF_INLINE bool any_not_equal(Vec a, Vec b) {
    const VecI differs = a != b;
    int32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= differs[i];
    return bits != 0;
}

// Sum over lanes in a fixed order.
PF_INLINE float sum_lanes(Vec v) {
    float parts[kWidth];
    store(parts, v);
    for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    }
    return parts[0];
}

// 2^x for x <= 128, relative error below 2e-7; exactly 1 at 0, exactly 0 from -127 down (-inf included), NaN
// at NaN. No denormal is ever made.
//
// x = n + f with integer n and f in [-1/2, 1/2]; 2^f by the degree-5 minimax polynomial with constant term 1.
PF_INLINE Vec exp2_fraction(Vec f) {
    Vec poly = broadcast(0.0013264727197217184f);
    poly = fma(poly, f, broadcast(0.009671512639650576f));
    poly = fma(poly, f, broadcast(0.05550733743251899f));
    poly = fma(poly, f, broadcast(0.2402224208537506f));
    poly = fma(poly, f, broadcast(0.6931469775991641f));
    return fma(poly, f, broadcast(1.0f));
}

#if defined(__AVX512F__)
PF_INLINE Vec exp2(Vec x) {
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLE_UQ);
    const __m512 n = _mm512_maskz_roundscale_ps(0xFFFF, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
    return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)exp2_fraction(x - (Vec)n), n);
}
#else
// Adding 1.5 * 2^23 rounds x to n and leaves it in the low mantissa bits, from where a shift makes it an
// exponent. At n = -127 the exponent field is 0 and the factor +0.
PF_INLINE Vec exp2(Vec x) {
    const Vec magic = broadcast(12582912.0f);
    const Vec clamped = max(broadcast(-127.0f), x);
    const Vec shifted = clamped + magic;
    const VecI exponent = ((VecI)shifted << 23) + broadcast_int(127 << 23);
    return exp2_fraction(clamped - (shifted - magic)) * (Vec)exponent;
}
#endif

// log2 of a positive normal x, absolute error below 1e-7; exactly 0 at 1, NaN at NaN and infinity.
//
// x = 2^n m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), by its series to s^9.
PF_INLINE Vec log2(Vec x) {
    const VecI bits = (VecI)x - broadcast_int(0x3F3504F3);  // of sqrt(1/2)
    const VecI exponent = bits >> 23;
    const Vec m = (Vec)((VecI)x - (exponent << 23));
    const Vec s = (m - broadcast(1.0f)) / (m + broadcast(1.0f)), square = s * s;
    Vec series = broadcast(0.32059889797532205f);  // 2 / ln 2 / 9, 7, 5, 3, 1
    series = fma(series, square, broadcast(0.41219858311112834f));
    series = fma(series, square, broadcast(0.5770780163555797f));
    series = fma(series, square, broadcast(0.9617966939259662f));
    series = fma(series, square, broadcast(2.8853900817779268f));
    const Vec whole = __builtin_convertvector(exponent, Vec);
    return fma(series, s, whole) + (x - x);  // NaN where x is
}

PF_INLINE float exp2(float x) {
    return exp2(broadcast(x))[0];
}

// Swap the off-diagonal blocks of size `Half` of two rows of a square of vectors.
template <int Half, int... I>
PF_INLINE void swap_blocks(Vec& top, Vec& bottom, std::integer_sequence<int, I...>) {
    const Vec a = top, b = bottom;
    top = __builtin_shufflevector(a, b, ((I & Half) ? kWidth + I - Half : I)...);
    bottom = __builtin_shufflevector(a, b, ((I & Half) ? kWidth + I : I + Half)...);
}

template <int Half>
PF_INLINE void transpose_stage(Vec (&x)[kWidth]) {
    for (int r = 0; r < kWidth; ++r) {
        if (!(r & Half)) swap_blocks<Half>(x[r], x[r + Half], std::make_integer_sequence<int, kWidth>{});
    }
    if constexpr (Half > 1) transpose_stage<Half / 2>(x);
}

// target[c][r] = source[r][c] for a square of kWidth x kWidth floats.
PF_INLINE void transpose_square(const float* source, int64_t source_stride, float* target,
                                int64_t target_stride) {
    Vec x[kWidth];
    for (int r = 0; r < kWidth; ++r) x[r] = load(source + r * source_stride);
    transpose_stage<kWidth / 2>(x);
    for (int r = 0; r < kWidth; ++r) store(target + r * target_stride, x[r]);
}

}  // namespace prefix_fast
