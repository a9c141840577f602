// mma.sync and ldmatrix: the fragments' layouts are those of mma.cuh, element by element.

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "traffic.h"
#include "warp_operations.h"

namespace cuda_emulator {

namespace {

constexpr int kRows = 16, kColumns = 8, kMostInner = 16;

typedef float Row __attribute__((vector_size(4 * kColumns)));

struct Product {
    float a[kRows][kMostInner];
    Row b[kMostInner], d[kRows];
};

template <Element element>
void unpack(uint32_t pair, float& low, float& high) {
    if constexpr (element == Element::kBf16) {
        low = __builtin_bit_cast(float, pair << 16);
        high = __builtin_bit_cast(float, pair & 0xffff0000u);
    } else {
        low = static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(pair)));
        high = static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(pair >> 16)));
    }
}

// The tensor cores read the upper 19 bits.
float tf32(uint32_t bits) {
    return __builtin_bit_cast(float, bits & 0xffffe000u);
}

template <Element element>
void gather(const Requests& requests, Product& p) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t *a = requests.a[lane], *b = requests.b[lane];
        if constexpr (element == Element::kTf32) {
            p.a[g][t] = tf32(a[0]);
            p.a[g + 8][t] = tf32(a[1]);
            p.a[g][t + 4] = tf32(a[2]);
            p.a[g + 8][t + 4] = tf32(a[3]);
            p.b[t][g] = tf32(b[0]);
            p.b[t + 4][g] = tf32(b[1]);
        } else {
            for (int i = 0; i < 4; ++i) {
                float* row = &p.a[g + (i & 1) * 8][2 * t + (i >> 1) * 8];
                unpack<element>(a[i], row[0], row[1]);
            }
            for (int i = 0; i < 2; ++i) {
                const int k = 2 * t + 8 * i;
                float low, high;
                unpack<element>(b[i], low, high);
                p.b[k][g] = low;
                p.b[k + 1][g] = high;
            }
        }
        const float* d = requests.d[lane];
        for (int i = 0; i < 4; ++i) p.d[g + 8 * (i >> 1)][2 * t + (i & 1)] = d[i];
    }
}

void scatter(const Requests& requests, const Product& p) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) requests.d[lane][i] = p.d[g + 8 * (i >> 1)][2 * t + (i & 1)];
    }
}

template <int kInner>
inline __attribute__((always_inline)) void accumulate(Product& p) {
    for (int m = 0; m < kRows; m += 8)
        for (int k = 0; k < kInner; ++k)
            for (int i = 0; i < 8; ++i) p.d[m + i] += p.a[m + i][k] * p.b[k];
}

}  // namespace

void multiply(Warp& warp) {
    ++machine.counters.mma;
    machine.counters.mma_most = std::max(machine.counters.mma_most, ++warp.block->mma);
    Product p;
    switch (static_cast<Element>(warp.requests.header[0].kind)) {
        case Element::kF16:
            gather<Element::kF16>(warp.requests, p), accumulate<16>(p);
            break;
        case Element::kBf16:
            gather<Element::kBf16>(warp.requests, p), accumulate<16>(p);
            break;
        case Element::kTf32:
            gather<Element::kTf32>(warp.requests, p), accumulate<8>(p);
            break;
    }
    scatter(warp.requests, p);
}

void load_matrices(Warp& warp) {
    ++machine.counters.ldmatrix;
    const int matrices = warp.requests.header[0].kind / 2;
    const bool transposed = warp.requests.header[0].kind % 2;
    Thread* const caller = machine.current;
    uint64_t rows[kLanes];
    for (int lane = 0; lane < 8 * matrices; ++lane) {
        const uint64_t row = rows[lane] = reinterpret_cast<uint64_t>(warp.requests.row[lane]);
        machine.current = warp.threads + lane;  // an access is that of the lane that gives its address
        if (!shared_memory.contains(row)) {
            report(Check::kOutOfBounds, warp.requests.place[lane], warp.requests.row[lane], 16,
                   "ldmatrix of an address that is not in shared memory");
            machine.current = caller;
            abandon();
        }
        if (row % 16 != 0)
            report(Check::kMisaligned, warp.requests.place[lane], warp.requests.row[lane], 16,
                   "a row of ldmatrix begins at no multiple of 16");
        shared_memory.access(row, 16, kRead, warp.requests.place[lane]);
    }
    machine.current = caller;
    if (machine.settings.traffic) count_rows(rows, 8 * matrices, warp.requests.place[0]);
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < matrices; ++i) {
            uint16_t pair[2];
            for (int j = 0; j < 2; ++j) {
                const int row = transposed ? 2 * t + j : g, column = transposed ? g : 2 * t + j;
                std::memcpy(&pair[j], reinterpret_cast<const char*>(rows[8 * i + row]) + 2 * column, 2);
            }
            std::memcpy(warp.requests.registers[lane] + i, pair, 4);
        }
    }
}

uint16_t to_half(float value) {
    return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
}

float from_half(uint16_t bits) {
    return static_cast<float>(__builtin_bit_cast(_Float16, bits));
}

// The hardware's is an approximation to 2 units in the last place; denormal results and arguments count as
// zero.
float exp2_approx(float x) {
    const float power = __builtin_exp2f(x);
    return power < 1.17549435e-38f ? 0.0f : power;
}

}  // namespace cuda_emulator
