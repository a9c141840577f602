// The device functions that CUDA predefines: barriers, warp functions, atomics, arithmetic.
#pragma once

// Barriers and fences.
__forceinline__ void __syncthreads(CUDA_EMULATOR_SITE) {
    cuda_emulator::sync_threads(file, line);
}
__forceinline__ int __syncthreads_count(int predicate, CUDA_EMULATOR_SITE) {
    return cuda_emulator::sync_threads_count(predicate != 0, file, line);
}
__forceinline__ int __syncthreads_or(int predicate, CUDA_EMULATOR_SITE) {
    return cuda_emulator::sync_threads_count(predicate != 0, file, line) != 0;
}
__forceinline__ int __syncthreads_and(int predicate, CUDA_EMULATOR_SITE) {
    return cuda_emulator::sync_threads_count(predicate == 0, file, line) == 0;
}
__forceinline__ void __syncwarp(uint32_t mask = 0xffffffffu) {
    cuda_emulator::sync_warp(mask);
}
__forceinline__ void __threadfence() {
    cuda_emulator::thread_fence();
}
__forceinline__ void __threadfence_system() {
    cuda_emulator::thread_fence();
}
__forceinline__ void __threadfence_block() {}

// Shuffles and votes.
namespace cuda_emulator {
template <typename T>
__forceinline__ T shuffle_value(Shuffle kind, uint32_t mask, T value, int operand, int width) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "a shuffle takes 2, 4 or 8 bytes");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = shuffle(kind, mask, bits, operand, width);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}
}  // namespace cuda_emulator

template <typename T>
__forceinline__ T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
    return cuda_emulator::shuffle_value(cuda_emulator::Shuffle::kIndex, mask, value, lane, width);
}
template <typename T>
__forceinline__ T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32) {
    return cuda_emulator::shuffle_value(cuda_emulator::Shuffle::kXor, mask, value, lanes, width);
}
template <typename T>
__forceinline__ T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    return cuda_emulator::shuffle_value(cuda_emulator::Shuffle::kUp, mask, value, static_cast<int>(delta),
                                        width);
}
template <typename T>
__forceinline__ T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    return cuda_emulator::shuffle_value(cuda_emulator::Shuffle::kDown, mask, value, static_cast<int>(delta),
                                        width);
}
__forceinline__ uint32_t __ballot_sync(uint32_t mask, int predicate) {
    return cuda_emulator::ballot(mask, predicate != 0);
}
__forceinline__ int __any_sync(uint32_t mask, int predicate) {
    return cuda_emulator::ballot(mask, predicate != 0) != 0;
}
__forceinline__ int __all_sync(uint32_t mask, int predicate) {
    return cuda_emulator::ballot(mask, predicate == 0) == 0;
}
template <typename T>
__forceinline__ uint32_t __match_any_sync(uint32_t mask, T value) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return cuda_emulator::match_any(mask, bits);
}

// Atomics return the old value.
template <typename T>
__forceinline__ T atomicAdd(T* address, std::type_identity_t<T> value) {
    return cuda_emulator::atomic(address, [&](T old) { return T(old + value); });
}
template <typename T>
__forceinline__ T atomicSub(T* address, std::type_identity_t<T> value) {
    return cuda_emulator::atomic(address, [&](T old) { return T(old - value); });
}
template <typename T>
__forceinline__ T atomicMax(T* address, std::type_identity_t<T> value) {
    return cuda_emulator::atomic(address, [&](T old) { return old < value ? value : old; });
}
template <typename T>
__forceinline__ T atomicMin(T* address, std::type_identity_t<T> value) {
    return cuda_emulator::atomic(address, [&](T old) { return value < old ? value : old; });
}
template <typename T>
__forceinline__ T atomicExch(T* address, std::type_identity_t<T> value) {
    return cuda_emulator::atomic(address, [&](T) { return value; });
}
template <typename T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> compared, std::type_identity_t<T> value) {
    return cuda_emulator::atomic(address, [&](T old) { return old == compared ? value : old; });
}
template <typename T>
__forceinline__ T atomicOr(T* address, std::type_identity_t<T> value) {
    return cuda_emulator::atomic(address, [&](T old) { return T(old | value); });
}
template <typename T>
__forceinline__ T atomicAnd(T* address, std::type_identity_t<T> value) {
    return cuda_emulator::atomic(address, [&](T old) { return T(old & value); });
}
__forceinline__ unsigned atomicInc(unsigned* address, unsigned last) {
    return cuda_emulator::atomic(address, [&](unsigned old) { return old >= last ? 0u : old + 1; });
}

// Loads and stores with a hint for the caches are plain ones.
template <typename T>
__forceinline__ T __ldg(const T* from) {
    return *from;
}
template <typename T>
__forceinline__ T __ldcg(const T* from) {
    return *from;
}
template <typename T>
__forceinline__ T __ldcs(const T* from) {
    return *from;
}
template <typename T>
__forceinline__ void __stcg(T* to, const T& value) {
    *to = value;
}
template <typename T>
__forceinline__ void __stcs(T* to, const T& value) {
    *to = value;
}

// Bits.
template <typename To, typename From>
__forceinline__ To cuda_emulator_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    return __builtin_bit_cast(To, value);
}
__forceinline__ float __uint_as_float(unsigned bits) {
    return cuda_emulator_bits<float>(bits);
}
__forceinline__ float __int_as_float(int bits) {
    return cuda_emulator_bits<float>(bits);
}
__forceinline__ unsigned __float_as_uint(float value) {
    return cuda_emulator_bits<unsigned>(value);
}
__forceinline__ int __float_as_int(float value) {
    return cuda_emulator_bits<int>(value);
}
__forceinline__ int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}
__forceinline__ int __popcll(unsigned long long bits) {
    return __builtin_popcountll(bits);
}
__forceinline__ int __clz(int bits) {
    return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}
__forceinline__ int __ffs(int bits) {
    return __builtin_ffs(bits);
}
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((uint64_t(a) * b) >> 32);
}
__forceinline__ int __mulhi(int a, int b) {
    return static_cast<int>((int64_t(a) * b) >> 32);
}
__forceinline__ size_t __cvta_generic_to_shared(const void* address) {
    return reinterpret_cast<size_t>(address);
}

// Arithmetic. The fast forms are as exact as the plain ones here.
__forceinline__ float __fmaf_rn(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
__forceinline__ float __fmul_rn(float a, float b) {
    return a * b;
}
__forceinline__ float __fadd_rn(float a, float b) {
    return a + b;
}
__forceinline__ float __fdividef(float a, float b) {
    return a / b;
}
__forceinline__ float __frcp_rn(float a) {
    return 1.0f / a;
}
__forceinline__ float __expf(float x) {
    return expf(x);
}
__forceinline__ float __logf(float x) {
    return logf(x);
}
__forceinline__ float __log2f(float x) {
    return log2f(x);
}
__forceinline__ float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
__forceinline__ float fdividef(float a, float b) {
    return a / b;
}

#define CUDA_EMULATOR_ORDER(T)        \
    __forceinline__ T min(T a, T b) { \
        return b < a ? b : a;         \
    }                                 \
    __forceinline__ T max(T a, T b) { \
        return a < b ? b : a;         \
    }
CUDA_EMULATOR_ORDER(int)
CUDA_EMULATOR_ORDER(unsigned)
CUDA_EMULATOR_ORDER(long)
CUDA_EMULATOR_ORDER(unsigned long)
CUDA_EMULATOR_ORDER(long long)
CUDA_EMULATOR_ORDER(unsigned long long)
#undef CUDA_EMULATOR_ORDER
__forceinline__ float min(float a, float b) {
    return fminf(a, b);
}
__forceinline__ float max(float a, float b) {
    return fmaxf(a, b);
}
