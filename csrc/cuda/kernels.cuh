// Which instantiations of the kernels there are, and their C names: prefix_fast_<kernel>_<fp16 | bf16 | fp32
// | tf32>.
//
// A build may compile one type to an object (-DPREFIX_FAST_TYPE=fp16), or fewer head dims
// (-DPREFIX_FAST_HEAD_DIMS="X(64) X(128)", ascending). A head dim takes the least tile that holds it.
// Float32, and the split forward, which waits for memory, have tiles of powers of two alone: 80 and 96 would
// not pay their compilation.
#pragma once

#include <type_traits>

#include <cuda_runtime.h>

#include "plan.h"
#include "segments.cuh"
#include "tiles.cuh"

#ifndef PREFIX_FAST_HEAD_DIMS
#define PREFIX_FAST_HEAD_DIMS X(64) X(80) X(96) X(128) X(256)
#endif

// The emulator's tests call these functions in a library of their own.
#define PREFIX_FAST_EXPORT extern "C" __attribute__((visibility("default")))

namespace prefix_fast::cuda {

// run(std::integral_constant<int, D>) of the least compiled D that holds the head dim.
template <typename T, bool kPowersAlone = !kIsHalf<T>, typename Run>
int with_head_dim(int head_dim, const Run& run) {
#define X(D)                                                                                         \
    if constexpr ((!kPowersAlone || (D & (D - 1)) == 0) && (D <= 128 || !std::is_same_v<T, Tf32>)) { \
        if (head_dim <= D) return static_cast<int>(run(std::integral_constant<int, D>{}));           \
    }
    PREFIX_FAST_HEAD_DIMS
#undef X
    return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace prefix_fast::cuda

#define PREFIX_FAST_TYPE_fp16(define) define(fp16, __half)
#define PREFIX_FAST_TYPE_bf16(define) define(bf16, __nv_bfloat16)
#define PREFIX_FAST_TYPE_fp32(define) define(fp32, float)
#define PREFIX_FAST_TYPE_tf32(define) define(tf32, prefix_fast::cuda::Tf32)
#define PREFIX_FAST_TYPES_OF_(type, define) PREFIX_FAST_TYPE_##type(define)
#define PREFIX_FAST_TYPES_OF(type, define) PREFIX_FAST_TYPES_OF_(type, define)
#ifdef PREFIX_FAST_TYPE
#define PREFIX_FAST_TYPES(define) PREFIX_FAST_TYPES_OF(PREFIX_FAST_TYPE, define)
#else
#define PREFIX_FAST_TYPES(define)                                                             \
    PREFIX_FAST_TYPE_fp16(define) PREFIX_FAST_TYPE_bf16(define) PREFIX_FAST_TYPE_fp32(define) \
        PREFIX_FAST_TYPE_tf32(define)
#endif
