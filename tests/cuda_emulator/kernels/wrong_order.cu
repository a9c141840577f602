// Kernels whose accesses, barriers or warps nothing orders.

#include "wrong.h"

namespace {

// Races of a block.

template <bool kWrong>
__global__ void read_unordered(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads];
    const int i = threadIdx.x;
    tile[i] = 0.0f;
    __syncthreads();
    tile[i] = in[i];  // caught: read_unordered
    if (!kWrong) __syncthreads();
    out[i] = tile[(i + 32) % kThreads] + tile[i];  // caught: read_unordered
}

template <bool kWrong>
__global__ void write_unordered(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads];
    const int i = threadIdx.x;
    float sum = 0.0f;
    for (int step = 0; step < 3; ++step) {
        tile[i] = in[i] * step;  // caught: write_unordered
        __syncthreads();
        sum += tile[(i + 32) % kThreads];  // caught: write_unordered
        if (!kWrong) __syncthreads();
    }
    out[i] = sum;
}

template <bool kWrong>
__global__ void write_twice(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads];
    const int i = threadIdx.x;
    tile[kWrong ? i / 2 : i] = in[i];  // caught: write_twice
    __syncthreads();
    out[i] = tile[kWrong ? i / 2 : i];
}

// Neighbours write the two halves of one word, which is no race.
template <bool kWrong>
__global__ void halves_of_a_word(const float* in, float* out, int* count, int n) {
    __shared__ __half tile[kThreads];
    const int i = threadIdx.x;
    tile[i] = 0.0f;
    __syncthreads();
    tile[i] = __float2half(in[i]);  // caught: halves_of_a_word
    if (!kWrong) __syncthreads();
    out[i] = __half2float(tile[i ^ 1]);  // caught: halves_of_a_word
}

template <bool kWrong>
__global__ void warp_unordered(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads];
    const int i = threadIdx.x;
    tile[i] = 0.0f;
    __syncthreads();
    tile[i] = in[i];  // caught: warp_unordered
    if (!kWrong) __syncwarp();
    out[i] = tile[i ^ 1];  // caught: warp_unordered
}

template <bool kWrong>
__global__ void part_of_a_warp_unordered(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads];
    const int i = threadIdx.x, lane = i % 32;
    tile[i] = 0.0f;
    __syncthreads();
    const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    tile[i] = in[i];  // caught: part_of_a_warp_unordered
    __syncwarp(half);
    out[i] = tile[i ^ (kWrong ? 16 : 8)];  // caught: part_of_a_warp_unordered
}

template <bool kWrong>
__global__ void shuffle_orders_nothing(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads];
    const int i = threadIdx.x;
    tile[i] = 0.0f;
    __syncthreads();
    tile[i] = in[i];  // caught: shuffle_orders_nothing
    const float other = __shfl_xor_sync(0xffffffffu, in[i], 1);
    if (!kWrong) __syncwarp();
    out[i] = tile[i ^ 1] - other;  // caught: shuffle_orders_nothing
}

template <bool kWrong>
__global__ void named_too_narrow(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads];
    const int i = threadIdx.x;
    tile[i] = 0.0f;
    __syncthreads();
    tile[i] = in[i];  // caught: named_too_narrow
    if (kWrong)
        named_barrier_sync(1 + i / 32, 32);
    else
        named_barrier_sync(1, kThreads);
    out[i] = tile[kThreads - 1 - i];  // caught: named_too_narrow
}

template <bool kWrong>
__global__ void arrival_too_early(const float* in, float* out, int* count, int n) {
    __shared__ float tile[kThreads];
    const int i = threadIdx.x;
    tile[i] = 0.0f;
    __syncthreads();
    if (i < 32) {
        if (!kWrong) tile[i] = in[i];
        named_barrier_arrive(2, kThreads);
        if (kWrong) tile[i] = in[i];  // caught: arrival_too_early
        out[i] = 0.0f;
    } else {
        named_barrier_sync(2, kThreads);
        out[i] = tile[i - 32];  // caught: arrival_too_early
    }
}

template <bool kWrong>
__global__ void atomic_and_plain(const float* in, float* out, int* count, int n) {
    __shared__ int sum;
    const int i = threadIdx.x;
    if (i == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, i);  // caught: atomic_and_plain
    if (!kWrong) __syncthreads();
    out[i] = static_cast<float>(sum);  // caught: atomic_and_plain
}

// Races between blocks.

template <bool kWrong>
__global__ void blocks_write_one(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x + (kWrong ? kThreads / 2 : kThreads) * blockIdx.x;
    out[i] = in[i];  // caught: blocks_write_one
}

template <bool kWrong>
__global__ void blocks_add(const float* in, float* out, int* count, int n) {
    if (kWrong)
        *count = *count + 1;  // caught: blocks_add
    else
        atomicAdd(count, 1);
}

// The last block to arrive adds up what all have written; kWrong leaves the writers' fence out.
template <bool kWrong>
__global__ void writers_without_fence(const float* in, float* out, int* count, int n) {
    __shared__ bool last;
    const int i = threadIdx.x + kThreads * blockIdx.x;
    out[i] = in[i];
    if (!kWrong) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(count, 1) == static_cast<int>(gridDim.x) - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    float sum = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block)
        sum += out[threadIdx.x + kThreads * block];  // caught: writers_without_fence
    __syncthreads();
    out[threadIdx.x] = sum;
}

// The same; kWrong leaves the reader's fence out.
template <bool kWrong>
__global__ void reader_without_fence(const float* in, float* out, int* count, int n) {
    __shared__ bool last;
    out[threadIdx.x + kThreads * blockIdx.x] = in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(count, 1) == static_cast<int>(gridDim.x) - 1;
        if (!kWrong) __threadfence();
    }
    __syncthreads();
    if (!last) return;
    float sum = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block)
        sum += out[threadIdx.x + kThreads * block];  // caught: reader_without_fence
    __syncthreads();
    out[threadIdx.x] = sum;
}

// Barriers and warps that come apart.

template <bool kWrong>
__global__ void barrier_in_a_branch(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    if (!kWrong || i < 32) __syncthreads();  // caught: barrier_in_a_branch
    out[i] = in[i];
}

template <bool kWrong>
__global__ void two_barriers(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    if (kWrong && i < 32) {
        out[i] = in[i];
        __syncthreads();  // caught: two_barriers
    } else {
        out[i] = in[i];
        __syncthreads();  // caught: two_barriers
    }
}

template <bool kWrong>
__global__ void named_miscount(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    named_barrier_sync(3, kWrong && i >= 32 ? 2 * kThreads : kThreads);  // caught: named_miscount
    out[i] = in[i];
}

template <bool kWrong>
__global__ void shuffle_in_a_branch(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    float value = in[i];
    if (!kWrong || i % 32 < 16)
        value = __shfl_xor_sync(0xffffffffu, value, 1);  // caught: shuffle_in_a_branch
    out[i] = value;
}

template <bool kWrong>
__global__ void shuffle_from_outside(const float* in, float* out, int* count, int n) {
    const int i = threadIdx.x;
    float value = in[i];
    if (i % 32 < 16)
        value = __shfl_xor_sync(0x0000ffffu, value, kWrong ? 16 : 8);  // caught: shuffle_from_outside
    out[i] = value;
}

template <bool kWrong>
__global__ void product_of_half_a_warp(const float* in, float* out, int* count, int n) {
    const uint32_t a[4] = {}, b[2] = {};
    float d[4] = {};
    if (!kWrong || threadIdx.x % 32 < 16) mma_m16n8k16<__half>(d, a, b);  // caught: product_of_half_a_warp
    out[threadIdx.x] = d[0];
}

}  // namespace

PROBE(read_unordered, 1)
PROBE(write_unordered, 1)
PROBE(write_twice, 1)
PROBE(halves_of_a_word, 1)
PROBE(warp_unordered, 1)
PROBE(part_of_a_warp_unordered, 1)
PROBE(shuffle_orders_nothing, 1)
PROBE(named_too_narrow, 1)
PROBE(arrival_too_early, 1)
PROBE(atomic_and_plain, 1)
PROBE(blocks_write_one, 3)
PROBE(blocks_add, 3)
PROBE(writers_without_fence, 4)
PROBE(reader_without_fence, 4)
PROBE(barrier_in_a_branch, 1)
PROBE(two_barriers, 1)
PROBE(named_miscount, 1)
PROBE(shuffle_in_a_branch, 1)
PROBE(shuffle_from_outside, 1)
PROBE(product_of_half_a_warp, 1)
