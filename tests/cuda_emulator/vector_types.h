// CUDA's vector types: plain structs with the alignment of their whole.
#pragma once

#include <cstdint>

#define CUDA_EMULATOR_VECTORS(T, name)                            \
    struct name##2 {                                              \
        T x, y;                                                   \
    }                                                             \
    __attribute__((aligned(2 * sizeof(T))));                      \
    struct name##3 {                                              \
        T x, y, z;                                                \
    };                                                            \
    struct name##4 {                                              \
        T x, y, z, w;                                             \
    }                                                             \
    __attribute__((aligned(sizeof(T) < 4 ? 4 * sizeof(T) : 16))); \
    inline name##2 make_##name##2(T x, T y) {                     \
        return {x, y};                                            \
    }                                                             \
    inline name##3 make_##name##3(T x, T y, T z) {                \
        return {x, y, z};                                         \
    }                                                             \
    inline name##4 make_##name##4(T x, T y, T z, T w) {           \
        return {x, y, z, w};                                      \
    }

CUDA_EMULATOR_VECTORS(signed char, char)
CUDA_EMULATOR_VECTORS(unsigned char, uchar)
CUDA_EMULATOR_VECTORS(short, short)
CUDA_EMULATOR_VECTORS(unsigned short, ushort)
CUDA_EMULATOR_VECTORS(int, int)
CUDA_EMULATOR_VECTORS(unsigned int, uint)
CUDA_EMULATOR_VECTORS(long long, longlong)
CUDA_EMULATOR_VECTORS(unsigned long long, ulonglong)
CUDA_EMULATOR_VECTORS(float, float)
CUDA_EMULATOR_VECTORS(double, double)
#undef CUDA_EMULATOR_VECTORS

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};
