// What wrong_*.cu share: small kernels, each wrong in one way if kWrong, and right if not.
//
// A line that a check may name ends in "// caught: <kernel>". All have one signature: `in` holds n numbers
// and is read only, `out` as many that nothing has written, `count` is one integer, zero at first.
#pragma once

#include "launch.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "pipeline.cuh"

using namespace prefix_fast::cuda;

constexpr int kThreads = 64;

// The launcher of a kernel in both forms, on a number of blocks.
#define PROBE(kernel, blocks)                                                                              \
    extern "C" __attribute__((visibility("default"))) int kernel##_probe(                                  \
        const float* in, float* out, int* count, int64_t n, int64_t wrong, int64_t shared_bytes) {         \
        return wrong ? PREFIX_FAST_LAUNCH(kernel<true>, blocks, kThreads, shared_bytes, nullptr, in, out,  \
                                          count, int(n))                                                   \
                     : PREFIX_FAST_LAUNCH(kernel<false>, blocks, kThreads, shared_bytes, nullptr, in, out, \
                                          count, int(n));                                                  \
    }
