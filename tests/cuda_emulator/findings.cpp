#include <cstdarg>
#include <cstdio>

#include "fibre.h"
#include "memory.h"

namespace cuda_emulator {

Machine machine;

void abandon() {
    machine.abandoned = true;
    void* never;
    cuda_emulator_switch(&never, machine.scheduler);
    __builtin_unreachable();
}

std::string name_of(uint32_t thread) {
    const uint32_t number = thread % kMaxThreads, block = thread / kMaxThreads;
    const dim3 size = machine.block_size, grid = machine.grid;
    char text[96];
    std::snprintf(text, sizeof(text), "thread (%u, %u, %u) of block (%u, %u, %u)", number % size.x,
                  number / size.x % size.y, number / size.x / size.y, block % grid.x, block / grid.x % grid.y,
                  block / grid.x / grid.y);
    return text;
}

void report(Check check, uint64_t place, const void* address, uint64_t size, const char* format, ...) {
    const uint64_t offset = place == 0 ? 0 : place - module_base();
    for (Finding& known : machine.findings) {
        if (known.check == check && known.place == offset) {
            ++known.times;
            return;
        }
    }
    Finding finding{check, 1, offset, reinterpret_cast<uint64_t>(address), size, {}, {}, {}};
    if (const Thread* me = machine.current) {
        const dim3 block = me->warp->block->index;
        finding.block[0] = block.x, finding.block[1] = block.y, finding.block[2] = block.z;
        finding.thread[0] = me->index.x, finding.thread[1] = me->index.y, finding.thread[2] = me->index.z;
    }
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(finding.text, sizeof(finding.text), format, arguments);
    va_end(arguments);
    machine.findings.push_back(finding);
    const bool enough = static_cast<int>(machine.findings.size()) >= machine.settings.most_findings;
    if (enough && machine.current != nullptr && !machine.abandoned) abandon();
}

}  // namespace cuda_emulator
