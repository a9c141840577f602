// Rows of float32, bfloat16 or float16 in memory; float32 in every register and scratch buffer.
#pragma once

#include <cstdint>
#include <cstring>

#include "problem.h"
#include "simd.h"

namespace prefix_fast {

PF_INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

PF_INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

PF_INLINE float bfloat16_to_float(uint16_t h) {
    return from_bits(uint32_t(h) << 16);
}

// Round to nearest even; a NaN keeps its sign and becomes quiet.
PF_INLINE uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

PF_INLINE float float16_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    // Exponents are rebased by a multiplication, which also normalises denormals exactly.
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t magnitude = uint32_t(h & 0x7FFFu) << 13;
    const float scaled = from_bits(magnitude) * from_bits(239u << 23);  // 2^112
    const uint32_t finite = to_bits(scaled);
    return from_bits(sign | ((h & 0x7C00u) == 0x7C00u ? magnitude | 0x7F800000u : finite));
#endif
}

PF_INLINE uint16_t float_to_float16(float x) {
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t bits = to_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {  // denormal: the addition of 0.5 aligns and rounds the mantissa
        return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000u));
    }
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
#endif
}

// target[c] = factor * source[c]
inline void read_row(const char* source, DType dtype, int64_t count, float factor, float* target) {
    int64_t c = 0;
    if (dtype == DType::kFloat32) {
        const float* from = reinterpret_cast<const float*>(source);
        for (; c < count; ++c) target[c] = factor * from[c];
        return;
    }
    const uint16_t* from = reinterpret_cast<const uint16_t*>(source);
    if (dtype == DType::kBFloat16) {
        for (; c < count; ++c) target[c] = factor * bfloat16_to_float(from[c]);
        return;
    }
#if defined(__F16C__)
    for (; c + 8 <= count; c += 8) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c));
        _mm256_storeu_ps(target + c, _mm256_mul_ps(_mm256_set1_ps(factor), _mm256_cvtph_ps(half)));
    }
#endif
    for (; c < count; ++c) target[c] = factor * float16_to_float(from[c]);
}

// target[c] = factor * source[c], rounded to `dtype`
inline void write_row(char* target, DType dtype, int64_t count, float factor, const float* source) {
    int64_t c = 0;
    if (dtype == DType::kFloat32) {
        float* to = reinterpret_cast<float*>(target);
        for (; c < count; ++c) to[c] = factor * source[c];
        return;
    }
    uint16_t* to = reinterpret_cast<uint16_t*>(target);
    if (dtype == DType::kBFloat16) {
#if defined(__AVX512BF16__)
        for (; c + kWidth <= count; c += kWidth) {
            const __m256bh half = _mm512_cvtneps_pbh((__m512)(broadcast(factor) * load(source + c)));
            std::memcpy(to + c, &half, sizeof(half));
        }
#endif
        for (; c < count; ++c) to[c] = float_to_bfloat16(factor * source[c]);
        return;
    }
#if defined(__F16C__)
    for (; c + 8 <= count; c += 8) {
        const __m256 x = _mm256_mul_ps(_mm256_set1_ps(factor), _mm256_loadu_ps(source + c));
        const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c), half);
    }
#endif
    for (; c < count; ++c) to[c] = float_to_float16(factor * source[c]);
}

PF_INLINE float read_element(const char* source, DType dtype) {
    if (dtype == DType::kFloat32) {
        float x;
        std::memcpy(&x, source, sizeof(x));
        return x;
    }
    uint16_t h;
    std::memcpy(&h, source, sizeof(h));
    return dtype == DType::kBFloat16 ? bfloat16_to_float(h) : float16_to_float(h);
}

// kWidth elements that follow each other.
PF_INLINE Vec load_row(const char* source, DType dtype) {
    Vec row;
    if (dtype == DType::kFloat32) return load(reinterpret_cast<const float*>(source));
    if (dtype == DType::kBFloat16) {
        typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
        typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
        Halves halves;
        std::memcpy(&halves, source, sizeof(halves));
        return (Vec)(__builtin_convertvector(halves, Words) << 16);
    }
    read_row(source, dtype, kWidth, 1.0f, reinterpret_cast<float*>(&row));
    return row;
}

// A logit to log2 units. What is finite stays finite: finfo.min is a very small weight, not a mask.
PF_INLINE Vec in_log2(Vec logit) {
    const Vec scaled = max(broadcast(kLowest), broadcast(kLog2E) * logit);
    return select(logit == broadcast(-kInf), logit, scaled);
}

PF_INLINE float in_log2(float logit) {
    return in_log2(broadcast(logit))[0];
}

}  // namespace prefix_fast
