// Asynchronous copies from global into shared memory, and barriers of a part of a block.
//
// A thread issues copies, closes a group of them with cp_async_commit, and waits until at most N of its
// latest groups are still under way. What has arrived is visible to the thread that waited; to the others
// after a barrier. A buffer may be filled anew only after a barrier behind its last reader.
#pragma once

#include <cstdint>

namespace prefix_fast::cuda {

#ifdef PREFIX_FAST_EMULATE

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    cuda_emulator::cp_async(shared, global, 16, valid);
}

__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid) {
    cuda_emulator::cp_async(shared, global, 8, valid);
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid) {
    cuda_emulator::cp_async(shared, global, 4, valid);
}

__device__ __forceinline__ void cp_async_commit() {
    cuda_emulator::cp_async_commit();
}

template <int N>
__device__ __forceinline__ void cp_async_wait() {
    cuda_emulator::cp_async_wait(N);
}

__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
    cuda_emulator::named_barrier_sync(barrier, threads);
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    cuda_emulator::named_barrier_arrive(barrier, threads);
}

#else

// 16, 8 or 4 bytes; zeros, without a read of `global`, where not valid. Both addresses are multiples of the
// size.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most N of this thread's latest groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Barrier 1 to 15 of `threads` threads, a multiple of 32: all of them wait; or some only arrive and go on.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#endif

}  // namespace prefix_fast::cuda
