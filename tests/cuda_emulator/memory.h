// What an address is: shared memory, a registered buffer, a launch's parameters, a constant of the module, or
// nothing.
#pragma once

#include <memory>

#include "shadow.h"

namespace cuda_emulator {

struct Buffer {
    uint64_t begin, end;
    std::string name;
    bool writable;
    std::unique_ptr<Shadow> shadow;  // of a writable one
};

// A variable in shared memory: an offset in the thread-local block of the module. An overrun that lands in
// the next variable, or in the next part of dynamic shared memory, is seen by its race or by its value only.
struct SharedVariable {
    size_t offset, bytes;
    std::string name;
    bool used;  // by the present launch
};

class SharedMemory {
  public:
    void add(size_t offset, size_t bytes, const char* name);
    // Finds where the thread-local block of this host thread lies.
    void locate();
    bool contains(uint64_t address) const { return address - base_ < bytes_; }
    void begin_launch(size_t dynamic_bytes);
    void begin_block(int slot);
    void save(Block& block) const;
    void restore(const Block& block);
    void access(uint64_t address, size_t bytes, uint8_t access, uint64_t place);
    // Where the banks begin to count.
    uint64_t bank_offset(uint64_t address) const { return address - base_ - dynamic_offset_; }

  private:
    static SharedVariable* variable_at(std::vector<SharedVariable>& variables, size_t offset);

    std::vector<SharedVariable> variables_;
    std::vector<SharedVariable>
        guards_;  // g++ looks there whether a variable of class type has been constructed
    uint64_t base_ = 0;
    size_t bytes_ = 0, dynamic_offset_ = 0, dynamic_bytes_ = 0, static_bytes_ = 0;
    std::vector<std::unique_ptr<Shadow>> shadows_;  // by slot
    Shadow* shadow_ = nullptr;
};

extern SharedMemory shared_memory;

void register_buffer(uint64_t begin, size_t bytes, const char* name, bool writable, bool starts_written);
void forget_buffers();
// Buffer that holds the address, or null.
Buffer* buffer_at(uint64_t address);
void locate_module();
uint64_t module_base();

// Counts an access or an operation of a warp; too many abandon the launch, which may have no end.
inline void count_access(uint64_t place) {
    if (++machine.counters.accesses <= machine.settings.most_accesses) return;
    report(Check::kRunaway, place, nullptr, 0, "more than %zu accesses",
           static_cast<size_t>(machine.settings.most_accesses));
    abandon();
}

// Judges an access of the running thread; what lies outside of everything abandons the launch.
void access_memory(uint64_t address, size_t bytes, uint8_t access, uint64_t place);

}  // namespace cuda_emulator
