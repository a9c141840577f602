// What our kernels use of CUDA's header of this name. Conversions are calls: g++ takes the store of a
// converted value for a load as well.
#pragma once

struct __half {
    unsigned short __x;
    __half() = default;
    __forceinline__ __half(float value) : __x(cuda_emulator::to_half(value)) {}
    __forceinline__ operator float() const { return cuda_emulator::from_half(__x); }
};

struct __half2 {
    __half x, y;
} __attribute__((aligned(4)));

using half = __half;
using half2 = __half2;

__forceinline__ __half __float2half(float value) {
    return __half(value);
}
__forceinline__ __half __float2half_rn(float value) {
    return __half(value);
}
__forceinline__ float __half2float(__half value) {
    return float(value);
}
__forceinline__ __half2 __halves2half2(__half low, __half high) {
    return {low, high};
}
__forceinline__ __half2 __floats2half2_rn(float low, float high) {
    return {__half(low), __half(high)};
}
__forceinline__ __half2 __float22half2_rn(float2 pair) {
    return {__half(pair.x), __half(pair.y)};
}
__forceinline__ float2 __half22float2(__half2 pair) {
    return {float(pair.x), float(pair.y)};
}
__forceinline__ __half2 __float2half2_rn(float value) {
    return {__half(value), __half(value)};
}
__forceinline__ __half __low2half(__half2 pair) {
    return pair.x;
}
__forceinline__ __half __high2half(__half2 pair) {
    return pair.y;
}
__forceinline__ float __low2float(__half2 pair) {
    return float(pair.x);
}
__forceinline__ float __high2float(__half2 pair) {
    return float(pair.y);
}
__forceinline__ unsigned short __half_as_ushort(__half value) {
    return value.__x;
}
__forceinline__ __half __ushort_as_half(unsigned short bits) {
    return __builtin_bit_cast(__half, bits);
}
__forceinline__ __half2 __hadd2(__half2 a, __half2 b) {
    return {float(a.x) + float(b.x), float(a.y) + float(b.y)};
}
__forceinline__ __half2 __hmul2(__half2 a, __half2 b) {
    return {float(a.x) * float(b.x), float(a.y) * float(b.y)};
}
__forceinline__ __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {float(a.x) * float(b.x) + float(c.x), float(a.y) * float(b.y) + float(c.y)};
}
