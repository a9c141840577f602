// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), for dropout.
//
// key = the two halves of the seed; counter = (query i, key j >> 2, b * H + h, set); word j & 3 belongs to
// key j. A weight is kept when its word reaches floor(p * 2^32).
#pragma once

#include <cstdint>

namespace prefix_fast {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// In place on `Lanes` independent counters; a plain loop that the compiler vectorises.
template <int Lanes>
inline void philox(uint64_t seed, uint32_t (&c)[4][Lanes]) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < Lanes; ++i) {
            const uint64_t product0 = uint64_t(kPhiloxMultiplier0) * c[0][i];
            const uint64_t product1 = uint64_t(kPhiloxMultiplier1) * c[2][i];
            const uint32_t high0 = uint32_t(product0 >> 32), high1 = uint32_t(product1 >> 32);
            const uint32_t next0 = high1 ^ c[1][i] ^ key0, next2 = high0 ^ c[3][i] ^ key1;
            c[1][i] = uint32_t(product1);
            c[3][i] = uint32_t(product0);
            c[0][i] = next0;
            c[2][i] = next2;
        }
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
    }
}

}  // namespace prefix_fast
