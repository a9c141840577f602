// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), for dropout.
//
// key = the two halves of the seed; counter = (query i, key j >> 2, b * H + h, set); word j & 3 belongs to
// key j. A weight is kept when its word reaches floor(p * 2^32).
#pragma once

#include <cstdint>

#include "simd.h"

namespace prefix_fast {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

typedef uint32_t VecU __attribute__((vector_size(4 * kWidth)));

// The upper halves of the 64-bit products of every lane with m.
PF_INLINE VecU multiply_high(VecU a, uint32_t m) {
#if defined(__AVX512F__)
    const __m512i x = (__m512i)a, factor = _mm512_set1_epi64(m);
    const __mmask8 all = 0xFF;  // the forms without a mask warn in gcc 12
    const __m512i even = _mm512_maskz_srli_epi64(all, _mm512_maskz_mul_epu32(all, x, factor), 32);
    const __m512i odd = _mm512_maskz_mul_epu32(all, _mm512_maskz_srli_epi64(all, x, 32), factor);
    return (VecU)_mm512_mask_blend_epi32(0xAAAA, even, odd);
#elif defined(__AVX2__)
    const __m256i x = (__m256i)a, factor = _mm256_set1_epi64x(m);
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, factor), 32);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    return (VecU)_mm256_blend_epi32(even, odd, 0xAA);
#else
    VecU high;
    for (int i = 0; i < kWidth; ++i) high[i] = uint32_t((uint64_t(m) * a[i]) >> 32);
    return high;
#endif
}

// Ten rounds, in place, on the counters of a vector of lanes.
PF_INLINE void philox(uint64_t seed, VecU (&c)[4]) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const VecU high0 = multiply_high(c[0], kPhiloxMultiplier0), low0 = c[0] * kPhiloxMultiplier0;
        const VecU high1 = multiply_high(c[2], kPhiloxMultiplier1), low1 = c[2] * kPhiloxMultiplier1;
        c[0] = high1 ^ c[1] ^ key0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ key1;
        c[3] = low0;
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
    }
}

}  // namespace prefix_fast
