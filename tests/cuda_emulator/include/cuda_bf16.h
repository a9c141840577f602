// What our kernels use of CUDA's header of this name: bfloat16 is the upper half of a float32.
#pragma once

struct __nv_bfloat16 {
    unsigned short __x;
    __nv_bfloat16() = default;
    // To the nearest, ties to even; every NaN is 0x7fff.
    __forceinline__ __nv_bfloat16(float value) {
        const unsigned bits = __builtin_bit_cast(unsigned, value);
        __x =
            value != value ? 0x7fff : static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    __forceinline__ operator float() const {
        return __builtin_bit_cast(float, static_cast<unsigned>(__x) << 16);
    }
};

struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
} __attribute__((aligned(4)));

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

__forceinline__ __nv_bfloat16 __float2bfloat16(float value) {
    return __nv_bfloat16(value);
}
__forceinline__ __nv_bfloat16 __float2bfloat16_rn(float value) {
    return __nv_bfloat16(value);
}
__forceinline__ float __bfloat162float(__nv_bfloat16 value) {
    return float(value);
}
__forceinline__ __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) {
    return {low, high};
}
__forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__nv_bfloat16(low), __nv_bfloat16(high)};
}
__forceinline__ __nv_bfloat162 __float22bfloat162_rn(float2 pair) {
    return {__nv_bfloat16(pair.x), __nv_bfloat16(pair.y)};
}
__forceinline__ float2 __bfloat1622float2(__nv_bfloat162 pair) {
    return {float(pair.x), float(pair.y)};
}
__forceinline__ float __low2float(__nv_bfloat162 pair) {
    return float(pair.x);
}
__forceinline__ float __high2float(__nv_bfloat162 pair) {
    return float(pair.y);
}
__forceinline__ unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) {
    return value.__x;
}
__forceinline__ __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    return __builtin_bit_cast(__nv_bfloat16, bits);
}
