// The host functions that the kernels' sources export, as one table for each type of products.
#pragma once

#include "call.h"

#define PREFIX_FAST_DECLARE(type)                                                                            \
    extern "C" {                                                                                             \
    int prefix_fast_forward_##type(const prefix_fast::cuda::Call*, const prefix_fast::cuda::Results*,        \
                                   void*);                                                                   \
    int prefix_fast_decode_##type(const prefix_fast::cuda::Call*, const prefix_fast::cuda::Partials*,        \
                                  const prefix_fast::cuda::Results*, void*);                                 \
    int prefix_fast_decode_tile_##type(int, bool);                                                           \
    int prefix_fast_prepare_##type(const prefix_fast::cuda::Call*, const prefix_fast::cuda::Saved*, void*);  \
    int prefix_fast_backward_queries_##type(const prefix_fast::cuda::Call*, const prefix_fast::cuda::Saved*, \
                                            const prefix_fast::cuda::Tokens*, void*);                        \
    int prefix_fast_backward_keys_##type(const prefix_fast::cuda::Call*, const prefix_fast::cuda::Saved*,    \
                                         const prefix_fast::cuda::KeyGradients*, void*);                     \
    bool prefix_fast_short_serves_##type(int);                                                               \
    int prefix_fast_backward_short_##type(const prefix_fast::cuda::Call*, const prefix_fast::cuda::Saved*,   \
                                          const prefix_fast::cuda::Tokens*,                                  \
                                          const prefix_fast::cuda::KeyGradients*, void*);                    \
    int prefix_fast_add_parts_##type(const float*, void*, int64_t, int, int32_t, void*);                     \
    }                                                                                                        \
    namespace prefix_fast::cuda {                                                                            \
    constexpr Launchers kLaunchers_##type{                                                                   \
        &prefix_fast_forward_##type,          &prefix_fast_decode_##type,                                    \
        &prefix_fast_decode_tile_##type,      &prefix_fast_prepare_##type,                                   \
        &prefix_fast_backward_queries_##type, &prefix_fast_backward_keys_##type,                             \
        &prefix_fast_short_serves_##type,     &prefix_fast_backward_short_##type,                            \
        &prefix_fast_add_parts_##type};                                                                      \
    }

namespace prefix_fast::cuda {

// All return a cudaError_t; the last argument is the stream.
struct Launchers {
    int (*forward)(const Call*, const Results*, void*);
    int (*decode)(const Call*, const Partials*, const Results*, void*);
    int (*decode_tile)(int head_dim, bool many);  // queries of a tile
    int (*prepare)(const Call*, const Saved*, void*);
    int (*backward_queries)(const Call*, const Saved*, const Tokens*, void*);
    int (*backward_keys)(const Call*, const Saved*, const KeyGradients*, void*);
    bool (*short_serves)(int head_dim);
    int (*backward_short)(const Call*, const Saved*, const Tokens*, const KeyGradients*, void*);
    int (*add_parts)(const float* parts, void* target, int64_t count, int number, int32_t dtype, void*);
};

}  // namespace prefix_fast::cuda

PREFIX_FAST_DECLARE(fp16)
PREFIX_FAST_DECLARE(bf16)
PREFIX_FAST_DECLARE(fp32)
PREFIX_FAST_DECLARE(tf32)

// In device.cpp, and in the emulator.
extern "C" {
const char* prefix_fast_error_name(int error);
const char* prefix_fast_architectures();
int prefix_fast_driver_version();
int prefix_fast_runtime_version();
int prefix_fast_device_of_stream(void* stream);
}

namespace prefix_fast::cuda {

// Beyond, the operands of tf32 have no room in registers.
constexpr int kMostTf32 = 128;

inline const Launchers& launchers_of(const Call& call) {
    if (call.dtype == kFloat16) return kLaunchers_fp16;
    if (call.dtype == kBFloat16) return kLaunchers_bf16;
    return call.tf32 && call.head_dim <= kMostTf32 ? kLaunchers_tf32 : kLaunchers_fp32;
}

}  // namespace prefix_fast::cuda
