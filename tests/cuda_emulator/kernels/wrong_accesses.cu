// Kernels that reach what they must not: outside of memory, or what has not been written or has not arrived.

#include "wrong.h"

namespace {

// Bounds and alignment.

template <bool kWrong>
__global__ void read_behind(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    out[i] = in[kWrong ? i + n - kThreads + 1 : i];  // caught: read_behind
}

template <bool kWrong>
__global__ void write_before(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    out[kWrong ? i - 1 : i] = in[i];  // caught: write_before
}

template <bool kWrong>
__global__ void write_input(const float* in, float* out, int* count, int n) {
    float* to = kWrong ? const_cast<float*>(in) : out;
    to[threadIdx.x] = 1.0f;  // caught: write_input
}

template <bool kWrong>
__global__ void dynamic_behind(const float* in, float* out, int* count, int n) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    const int i = threadIdx.x;
    tile[kWrong ? i + 1 : i] = in[i];  // caught: dynamic_behind
    __syncthreads();
    out[i] = tile[i];
}

template <bool kWrong>
__global__ void static_behind(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads + 1];
    const int i = threadIdx.x;
    tile[kWrong ? i + 2 : i] = in[i];  // caught: static_behind
    __syncthreads();
    out[i] = tile[i];
}

template <bool kWrong>
__global__ void copy_behind(const float* in, float* out, int* count, int n) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    const int i = threadIdx.x;
    const bool valid = kWrong || 8 * i + 4 <= n;
    cp_async_16(tile + 4 * i, in + 8 * i, valid);  // caught: copy_behind
    cp_async_commit();
    cp_async_wait<0>();
    out[i] = tile[4 * i];
}

template <bool kWrong>
__global__ void misaligned_load(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x % 16;
    const uint4 four = load_global_16(in + (kWrong ? 2 : 4) * i);  // caught: misaligned_load
    out[threadIdx.x] = __uint_as_float(four.x);
}

template <bool kWrong>
__global__ void misaligned_copy(const float* in, float* out, int* count, int n) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    const int i = threadIdx.x;
    cp_async_8(tile + (kWrong ? 2 * i + 1 : 2 * i), in + i / 2 * 2, true);  // caught: misaligned_copy
    cp_async_commit();
    cp_async_wait<0>();
    out[i] = tile[kWrong ? 2 * i + 1 : 2 * i];
}

template <bool kWrong>
__global__ void misaligned_rows(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    reinterpret_cast<float*>(dynamic_shared)[i] = in[i];
    reinterpret_cast<float*>(dynamic_shared)[i + kThreads] = in[i];
    __syncthreads();
    uint32_t pair[2];
    ldmatrix_x2(pair, dynamic_shared + (kWrong ? 8 : 16) * (i % 16));  // caught: misaligned_rows
    out[i] = __uint_as_float(pair[0]);
}

// What nothing has written.

template <bool kWrong>
__global__ void unwritten_shared(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads];
    const int i = threadIdx.x;
    if (!kWrong || i != 5) tile[i] = in[i];
    __syncthreads();
    out[i] = tile[kThreads - 1 - i];  // caught: unwritten_shared
}

template <bool kWrong>
__global__ void unwritten_global(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    if (!kWrong) out[i] = 0.0f;
    out[i] += in[i];  // caught: unwritten_global
}

template <bool kWrong>
__global__ void unwritten_rows(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    if (!kWrong || i < 60) reinterpret_cast<float*>(dynamic_shared)[i] = in[i];
    __syncthreads();
    uint32_t pair[2];
    ldmatrix_x2(pair, dynamic_shared + 16 * (i % 16));  // caught: unwritten_rows
    out[i] = __uint_as_float(pair[1]);
}

// Asynchronous copies.

template <bool kWrong>
__global__ void copy_not_awaited(const float* in, float* out, int* count, int n) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    const int i = threadIdx.x;
    cp_async_4(tile + i, in + i, true);
    cp_async_commit();
    if (!kWrong) cp_async_wait<0>();
    out[i] = tile[i];  // caught: copy_not_awaited
    cp_async_wait<0>();
}

template <bool kWrong>
__global__ void wait_a_stage_early(const float* in, float* out, int* count, int n) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    const int i = threadIdx.x;
    for (int stage = 0; stage < 2; ++stage) {
        cp_async_4(tile + kThreads * stage + i, in + i, true);
        cp_async_commit();
    }
    float sum = 0.0f;
    for (int stage = 0; stage < 2; ++stage) {
        if (stage == 0 || kWrong)
            cp_async_wait<1>();
        else
            cp_async_wait<0>();
        sum += tile[kThreads * stage + i];  // caught: wait_a_stage_early
    }
    out[i] = sum;
    cp_async_wait<0>();
}

template <bool kWrong>
__global__ void copy_not_committed(const float* in, float* out, int* count, int n) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    const int i = threadIdx.x;
    cp_async_4(tile + i, in + i, true);
    if (!kWrong) cp_async_commit();
    cp_async_wait<0>();
    out[i] = tile[i];  // caught: copy_not_committed
}

template <bool kWrong>
__global__ void copy_for_others(const float* in, float* out, int* count, int n) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    const int i = threadIdx.x;
    tile[i] = 0.0f;
    __syncthreads();
    cp_async_4(tile + i, in + i, true);  // caught: copy_for_others
    cp_async_commit();
    cp_async_wait<0>();
    if (!kWrong) __syncthreads();
    out[i] = tile[i ^ 1];  // caught: copy_for_others
}

template <bool kWrong>
__global__ void refill_too_early(const float* in, float* out, int* count, int n) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    const int i = threadIdx.x;
    float sum = 0.0f;
    for (int step = 0; step < 3; ++step) {
        cp_async_4(tile + i, in + i, true);  // caught: refill_too_early
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        sum += tile[(i + 32) % kThreads];  // caught: refill_too_early
        if (!kWrong) __syncthreads();
    }
    out[i] = sum;
}

template <bool kWrong>
__global__ void copy_left_behind(const float* in, float* out, int* count, int n) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    const int i = threadIdx.x;
    cp_async_4(tile + i, in + i, true);  // caught: copy_left_behind
    cp_async_commit();
    if (!kWrong) cp_async_wait<0>();
    out[i] = in[i];
}

// Loops without an end.

template <bool kWrong>
__global__ void endless(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    for (int step = 0; step < (kWrong ? 1 << 30 : 8); ++step) out[i] = in[i] * step;  // caught: endless
}

}  // namespace

PROBE(read_behind, 1)
PROBE(write_before, 1)
PROBE(write_input, 1)
PROBE(dynamic_behind, 1)
PROBE(static_behind, 1)
PROBE(copy_behind, 1)
PROBE(misaligned_load, 1)
PROBE(misaligned_copy, 1)
PROBE(misaligned_rows, 1)
PROBE(unwritten_shared, 1)
PROBE(unwritten_global, 1)
PROBE(unwritten_rows, 1)
PROBE(copy_not_awaited, 1)
PROBE(wait_a_stage_early, 1)
PROBE(copy_not_committed, 1)
PROBE(copy_for_others, 1)
PROBE(refill_too_early, 1)
PROBE(copy_left_behind, 1)
PROBE(endless, 1)
