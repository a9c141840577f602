#include "fibre.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#error "the emulator's fibres are written for x86-64"
#endif

asm(R"(
.text
.hidden cuda_emulator_switch
.globl cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_emulator_switch, . - cuda_emulator_switch
)");

namespace cuda_emulator {

Stacks stacks;

namespace {
constexpr size_t kSavedRegisters = 6, kLeastRoom = 16 * 1024;
constexpr size_t kColours = 29, kColourBytes = 17 * 64;
}  // namespace

void Stacks::reserve(size_t count) {
    if (count * kStackBytes <= bytes_) return;
    if (bytes_ > 0) munmap(reinterpret_cast<void*>(base_), bytes_);
    bytes_ = count * kStackBytes;
    void* memory =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::fprintf(stderr, "cuda_emulator: no address space for %zu stacks\n", count);
        std::abort();
    }
    base_ = reinterpret_cast<uint64_t>(memory);
}

void Stacks::check_room(size_t number) const {
    const uint64_t low = base_ + number * kStackBytes,
                   here = reinterpret_cast<uint64_t>(__builtin_frame_address(0));
    if (here - low >= kLeastRoom) return;
    std::fprintf(stderr, "cuda_emulator: a thread's stack of %zu bytes is too small for a kernel\n",
                 kStackBytes);
    std::abort();
}

void* Stacks::prepare(size_t number, void (*entry)()) {
    // Tops at the same distance would share the sets of the cache: each begins some lines further down.
    uint64_t* top =
        reinterpret_cast<uint64_t*>(base_ + (number + 1) * kStackBytes - (number % kColours) * kColourBytes);
    *--top = 0;  // the return address of `entry`, never used; it aligns the stack as a call does
    *--top = reinterpret_cast<uint64_t>(entry);
    for (size_t i = 0; i < kSavedRegisters; ++i) *--top = 0;
    return top;
}

}  // namespace cuda_emulator
