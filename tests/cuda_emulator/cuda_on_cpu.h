// CUDA's dialect for g++: included before a kernel's source, which is then compiled unchanged for the CPU.
//
// Loads and stores are seen through -fsanitize=thread, whose callbacks are ours (callbacks.cpp); everything
// else that needs the machine is a call of a function declared here. `__shared__` is thread_local, so that
// static, extern and template uses all compile; a launch lays its threads out as fibres of the one thread
// that runs it.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
extern "C" void* memcpy(void*, const void*, size_t) __asm__("cuda_emulator_memcpy");
extern "C" void* memmove(void*, const void*, size_t) __asm__("cuda_emulator_memmove");
extern "C" void* memset(void*, int, size_t) __asm__("cuda_emulator_memset");
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

#include "vector_types.h"

// Where a call stands in the source.
#define CUDA_EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cuda_emulator {

// Constant within a fibre.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

void sync_threads(const char* file, int line);
int sync_threads_count(bool predicate, const char* file, int line);
void named_barrier_sync(int barrier, int threads);
void named_barrier_arrive(int barrier, int threads);
void sync_warp(uint32_t mask);
enum class Shuffle { kIndex, kXor, kUp, kDown };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width);
uint32_t ballot(uint32_t mask, bool predicate);
uint32_t match_any(uint32_t mask, uint64_t bits);
void thread_fence();

void mma_f16(float* d, const uint32_t* a, const uint32_t* b);
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b);
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b);
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed);
__attribute__((const)) uint16_t to_half(float value);
__attribute__((const)) float from_half(uint16_t bits);
__attribute__((const)) float exp2_approx(float x);

void cp_async(void* shared, const void* global, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int groups);

void load_bytes(void* to, const void* from, int bytes);
void store_bytes(void* to, const void* from, int bytes);

template <typename T>
__forceinline__ T load(const void* from) {
    T value;
    load_bytes(&value, from, sizeof(T));
    return value;
}

template <typename T>
__forceinline__ void store(void* to, const T& value) {
    store_bytes(to, &value, sizeof(T));
}

// An atomic operation is one access; `begin_atomic` checks it and returns the old bits. The arithmetic lies
// between.
uint64_t begin_atomic(void* address, int bytes);
void end_atomic(void* address, uint64_t bits, int bytes);

template <typename T, typename Update>
__forceinline__ T atomic(T* address, Update update) {
    const uint64_t bits = begin_atomic(address, sizeof(T));
    T old;
    __builtin_memcpy(&old, &bits, sizeof(T));
    const T now = update(old);
    uint64_t written = 0;
    __builtin_memcpy(&written, &now, sizeof(T));
    end_atomic(address, written, sizeof(T));
    return old;
}

// Runs all blocks of a grid. `call` runs the kernel once, on the arguments that `parameters` holds.
int run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
             const void* parameters, size_t parameter_bytes);

template <typename... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> arguments;
    static void run(const void* self) {
        const Call* call = static_cast<const Call*>(self);
        std::apply(call->kernel, call->arguments);
    }
};

template <typename... Parameters, typename... Arguments>
int launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                  const Arguments&... arguments) {
    const Call<Parameters...> call{kernel, {static_cast<Parameters>(arguments)...}};
    return run_grid(name, grid, block, shared_bytes, Call<Parameters...>::run, &call, sizeof(call));
}

}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::thread_index())
#define blockIdx (::cuda_emulator::block_index())
#define blockDim (::cuda_emulator::block_size())
#define gridDim (::cuda_emulator::grid_size())
constexpr int warpSize = 32;

#include "device_functions.h"
