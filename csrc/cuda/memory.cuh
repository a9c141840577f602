// Loads and stores of 16 and 8 bytes as one access each, shared memory by its one name, and 2^x.
#pragma once

#include <cstdint>

namespace prefix_fast::cuda {

// A launch's dynamic shared memory. It has this one name in all kernels.
extern __shared__ __align__(128) unsigned char dynamic_shared[];

#ifdef PREFIX_FAST_EMULATE

__device__ __forceinline__ uint4 load_global_16(const void* from) {
    return cuda_emulator::load<uint4>(from);
}
__device__ __forceinline__ uint2 load_global_8(const void* from) {
    return cuda_emulator::load<uint2>(from);
}
__device__ __forceinline__ uint4 load_shared_16(const void* from) {
    return cuda_emulator::load<uint4>(from);
}
__device__ __forceinline__ uint2 load_shared_8(const void* from) {
    return cuda_emulator::load<uint2>(from);
}
__device__ __forceinline__ void store_global_16(void* to, uint4 value) {
    cuda_emulator::store(to, value);
}
__device__ __forceinline__ void store_global_8(void* to, uint2 value) {
    cuda_emulator::store(to, value);
}
__device__ __forceinline__ void store_shared_16(void* to, uint4 value) {
    cuda_emulator::store(to, value);
}
__device__ __forceinline__ void store_shared_8(void* to, uint2 value) {
    cuda_emulator::store(to, value);
}
__device__ __forceinline__ float exp2_approx(float x) {
    return cuda_emulator::exp2_approx(x);
}

#else

// Addresses are multiples of the size.
__device__ __forceinline__ uint4 load_global_16(const void* from) {
    return *static_cast<const uint4*>(from);
}
__device__ __forceinline__ uint2 load_global_8(const void* from) {
    return *static_cast<const uint2*>(from);
}
__device__ __forceinline__ uint4 load_shared_16(const void* from) {
    return *static_cast<const uint4*>(from);
}
__device__ __forceinline__ uint2 load_shared_8(const void* from) {
    return *static_cast<const uint2*>(from);
}
__device__ __forceinline__ void store_global_16(void* to, uint4 value) {
    *static_cast<uint4*>(to) = value;
}
__device__ __forceinline__ void store_global_8(void* to, uint2 value) {
    *static_cast<uint2*>(to) = value;
}
__device__ __forceinline__ void store_shared_16(void* to, uint4 value) {
    *static_cast<uint4*>(to) = value;
}
__device__ __forceinline__ void store_shared_8(void* to, uint2 value) {
    *static_cast<uint2*>(to) = value;
}

// 2^x to two units in the last place; results below 2^-126 are 0, 2^-inf is 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

#endif

}  // namespace prefix_fast::cuda
