// Fibres: stacks, and the switch from one to another, in 8 ns where swapcontext takes 160 (it asks the kernel
// for the signal mask). A switch saves the registers that a callee must preserve (System V ABI for x86-64).
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" void cuda_emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));

namespace cuda_emulator {

// One range for all stacks, so that an access to one of them is recognised by one comparison.
constexpr size_t kStackBytes = 128 * 1024;

class Stacks {
  public:
    // Makes room for `count` stacks; their pages exist once they are touched.
    void reserve(size_t count);
    bool contains(uint64_t address) const { return address - base_ < bytes_; }
    // Ends the process if the running fibre, on the stack of this number, has little room left. (Guard pages
    // would be two mappings a stack, and a process may have 65530.)
    void check_room(size_t number) const;
    // A stack pointer with which a switch enters `entry`, which must not return.
    void* prepare(size_t number, void (*entry)());

  private:
    uint64_t base_ = 0;
    size_t bytes_ = 0;
};

extern Stacks stacks;

}  // namespace cuda_emulator
