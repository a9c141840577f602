// What g++ -fsanitize=thread calls for the loads and stores of a kernel. Most are of a fibre's own stack.

#include <cstring>

#include "fibre.h"
#include "memory.h"

using cuda_emulator::kRead;
using cuda_emulator::kWrite;

namespace {

__attribute__((always_inline)) inline void seen(const void* address, size_t bytes, uint8_t access,
                                                uint64_t place) {
    const uint64_t at = reinterpret_cast<uint64_t>(address);
    if (cuda_emulator::stacks.contains(at) || cuda_emulator::machine.current == nullptr) return;
    cuda_emulator::access_memory(at, bytes, access, place);
}

}  // namespace

#define CUDA_EMULATOR_SEES(bytes)                           \
    void __tsan_read##bytes(void* at) {                     \
        seen(at, bytes, kRead, CUDA_EMULATOR_PLACE);        \
    }                                                       \
    void __tsan_write##bytes(void* at) {                    \
        seen(at, bytes, kWrite, CUDA_EMULATOR_PLACE);       \
    }                                                       \
    void __tsan_unaligned_read##bytes(void* at) {           \
        seen(at, bytes, kRead, CUDA_EMULATOR_PLACE);        \
    }                                                       \
    void __tsan_unaligned_write##bytes(void* at) {          \
        seen(at, bytes, kWrite, CUDA_EMULATOR_PLACE);       \
    }                                                       \
    void __tsan_volatile_read##bytes(void* at) {            \
        seen(at, bytes, kRead, CUDA_EMULATOR_PLACE);        \
    }                                                       \
    void __tsan_volatile_write##bytes(void* at) {           \
        seen(at, bytes, kWrite, CUDA_EMULATOR_PLACE);       \
    }                                                       \
    void __tsan_unaligned_volatile_read##bytes(void* at) {  \
        seen(at, bytes, kRead, CUDA_EMULATOR_PLACE);        \
    }                                                       \
    void __tsan_unaligned_volatile_write##bytes(void* at) { \
        seen(at, bytes, kWrite, CUDA_EMULATOR_PLACE);       \
    }

extern "C" {
CUDA_EMULATOR_SEES(1)
CUDA_EMULATOR_SEES(2)
CUDA_EMULATOR_SEES(4)
CUDA_EMULATOR_SEES(8)
CUDA_EMULATOR_SEES(16)
void __tsan_read_range(void* at, size_t bytes) {
    seen(at, bytes, kRead, CUDA_EMULATOR_PLACE);
}
void __tsan_write_range(void* at, size_t bytes) {
    seen(at, bytes, kWrite, CUDA_EMULATOR_PLACE);
}

// A kernel's memcpy and memset have these names (cuda_on_cpu.h).
void* cuda_emulator_memcpy(void* to, const void* from, size_t bytes) {
    if (bytes > 0)
        seen(from, bytes, kRead, CUDA_EMULATOR_PLACE), seen(to, bytes, kWrite, CUDA_EMULATOR_PLACE);
    return std::memcpy(to, from, bytes);
}
void* cuda_emulator_memmove(void* to, const void* from, size_t bytes) {
    if (bytes > 0)
        seen(from, bytes, kRead, CUDA_EMULATOR_PLACE), seen(to, bytes, kWrite, CUDA_EMULATOR_PLACE);
    return std::memmove(to, from, bytes);
}
void* cuda_emulator_memset(void* to, int value, size_t bytes) {
    if (bytes > 0) seen(to, bytes, kWrite, CUDA_EMULATOR_PLACE);
    return std::memset(to, value, bytes);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

namespace cuda_emulator {

void load_bytes(void* to, const void* from, int bytes) {
    seen(from, static_cast<size_t>(bytes), kRead, CUDA_EMULATOR_PLACE);
    std::memcpy(to, from, static_cast<size_t>(bytes));
}

void store_bytes(void* to, const void* from, int bytes) {
    seen(to, static_cast<size_t>(bytes), kWrite, CUDA_EMULATOR_PLACE);
    std::memcpy(to, from, static_cast<size_t>(bytes));
}

}  // namespace cuda_emulator
