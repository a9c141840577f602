// Types of products, how their elements lie in registers, and a lane's place in a block of sums.
//
// T is __half or __nv_bfloat16 (tensor cores), float (FFMA, exact products) or Tf32 (float on tensor cores).
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "call.h"

namespace prefix_fast::cuda {

struct Tf32 {};

template <typename T>
using Storage = std::conditional_t<std::is_same_v<T, Tf32>, float, T>;

template <typename T>
constexpr bool kIsHalf = sizeof(Storage<T>) == 2;
template <typename T>
constexpr int kChunk = 16 / sizeof(Storage<T>);  // elements of 16 bytes
template <typename T, int D>
constexpr int kPitch = D + kChunk<T>;
constexpr int kWarp = 32;

// Blocks that share a multiprocessor: eight warps, which may then have 255 registers each.
constexpr int resident_blocks(int threads) {
    return 8 * kWarp / threads;
}

__device__ inline int lane() {
    return threadIdx.x % kWarp;
}
__device__ inline int warp() {
    return threadIdx.x / kWarp;
}
__device__ inline int lane_row() {  // g
    return lane() / 4;
}
__device__ inline int lane_column() {  // 2t
    return lane() % 4 * 2;
}

template <typename S>
__device__ inline uint32_t packed(float low, float high);
template <>
__device__ inline uint32_t packed<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t packed<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename S>
__device__ inline float2 unpacked(uint32_t pair);
template <>
__device__ inline float2 unpacked<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ inline float2 unpacked<__nv_bfloat16>(uint32_t pair) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

__device__ inline float as_float(uint32_t bits) {
    return __uint_as_float(bits);
}

}  // namespace prefix_fast::cuda
