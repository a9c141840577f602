#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstring>

#include "traffic.h"

namespace prefix_fast::cuda {
thread_local unsigned char dynamic_shared[cuda_emulator::kMaxDynamicShared] __attribute__((aligned(1024)));
}

namespace cuda_emulator {

SharedMemory shared_memory;

namespace {

constexpr size_t kMaxStaticShared = 48 * 1024;
std::vector<Buffer> buffers;  // by address
Buffer* last_buffer = nullptr;
uint64_t module_start = 0, module_end = 0, module_load = 0;

int find_module(dl_phdr_info* info, size_t, void*) {
    const uint64_t here = reinterpret_cast<uint64_t>(&module_load);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        const uint64_t begin = info->dlpi_addr + header.p_vaddr;
        if (header.p_type != PT_LOAD || here - begin >= header.p_memsz) continue;
        module_load = module_start = info->dlpi_addr;
        for (int j = 0; j < info->dlpi_phnum; ++j) {
            const auto& other = info->dlpi_phdr[j];
            if (other.p_type == PT_LOAD)
                module_end = std::max(module_end, info->dlpi_addr + other.p_vaddr + other.p_memsz);
        }
        return 1;
    }
    return 0;
}

// Names the buffer beside which an address lies.
std::string neighbour(uint64_t address) {
    const Buffer* nearest = nullptr;
    uint64_t distance = 1 << 20;
    for (const Buffer& buffer : buffers) {
        const uint64_t gap = address < buffer.begin ? buffer.begin - address : address - buffer.end;
        if (gap < distance) distance = gap, nearest = &buffer;
    }
    if (nearest == nullptr) return "of no buffer";
    return std::to_string(distance) +
           (address < nearest->begin ? " bytes before " : " bytes behind the end of ") + nearest->name;
}

}  // namespace

void SharedMemory::add(size_t offset, size_t bytes, const char* name) {
    const std::string whole = name;
    if (whole.find("guard variable") == 0)
        guards_.push_back({offset, bytes, name, false});
    else if (whole.find("dynamic_shared") != std::string::npos)
        dynamic_offset_ = offset;
    else
        variables_.push_back({offset, bytes, name, false});
    bytes_ = std::max(bytes_, (offset + bytes + 15) / 16 * 16);
}

void SharedMemory::locate() {
    base_ = reinterpret_cast<uint64_t>(prefix_fast::cuda::dynamic_shared) - dynamic_offset_;
    bytes_ = std::max(bytes_, dynamic_offset_ + kMaxDynamicShared);
}

SharedVariable* SharedMemory::variable_at(std::vector<SharedVariable>& variables, size_t offset) {
    for (SharedVariable& variable : variables)
        if (offset - variable.offset < variable.bytes) return &variable;
    return nullptr;
}

void SharedMemory::begin_launch(size_t dynamic_bytes) {
    dynamic_bytes_ = dynamic_bytes;
    static_bytes_ = 0;
    for (SharedVariable& variable : variables_) variable.used = false;
}

void SharedMemory::begin_block(int slot) {
    while (static_cast<int>(shadows_.size()) <= slot)
        shadows_.push_back(std::make_unique<Shadow>(Shadow::Space::kShared, bytes_, false));
    shadow_ = shadows_[slot].get();
    shadow_->clear(dynamic_offset_, dynamic_bytes_);
    std::memset(reinterpret_cast<void*>(base_ + dynamic_offset_), kPoison, dynamic_bytes_);
    for (const SharedVariable& variable : variables_) {
        shadow_->clear(variable.offset, variable.bytes);
        std::memset(reinterpret_cast<void*>(base_ + variable.offset), kPoison, variable.bytes);
    }
}

void SharedMemory::save(Block& block) const {
    const char* base = reinterpret_cast<const char*>(base_);
    block.shared.assign(base + dynamic_offset_, base + dynamic_offset_ + dynamic_bytes_);
    for (const SharedVariable& variable : variables_)
        block.shared.insert(block.shared.end(), base + variable.offset,
                            base + variable.offset + variable.bytes);
}

void SharedMemory::restore(const Block& block) {
    shadow_ = shadows_[block.slot].get();
    char* base = reinterpret_cast<char*>(base_);
    const char* from = block.shared.data();
    std::memcpy(base + dynamic_offset_, from, dynamic_bytes_);
    from += dynamic_bytes_;
    for (const SharedVariable& variable : variables_) {
        std::memcpy(base + variable.offset, from, variable.bytes);
        from += variable.bytes;
    }
}

void SharedMemory::access(uint64_t address, size_t bytes, uint8_t access, uint64_t place) {
    const size_t offset = address - base_, dynamic = offset - dynamic_offset_;
    if (dynamic >= kMaxDynamicShared) {
        if (variable_at(guards_, offset) != nullptr) return;
        SharedVariable* variable = variable_at(variables_, offset);
        if (variable == nullptr || offset + bytes > variable->offset + variable->bytes) {
            report(Check::kOutOfBounds, place, reinterpret_cast<void*>(address), bytes,
                   "shared memory outside of %s",
                   variable == nullptr ? "every variable" : variable->name.c_str());
            abandon();
        }
        if (!variable->used) {
            variable->used = true;
            static_bytes_ += variable->bytes;
            machine.counters.shared_bytes =
                std::max<uint64_t>(machine.counters.shared_bytes, static_bytes_ + dynamic_bytes_);
            if (static_bytes_ > kMaxStaticShared ||
                static_bytes_ + dynamic_bytes_ > machine.settings.shared_limit)
                report(Check::kSharedMemoryLimit, place, reinterpret_cast<void*>(address), bytes,
                       "%zu static and %zu dynamic bytes of shared memory, of %zu and %zu in all",
                       static_bytes_, dynamic_bytes_, kMaxStaticShared,
                       static_cast<size_t>(machine.settings.shared_limit));
        }
    } else if (dynamic + bytes > dynamic_bytes_) {
        report(Check::kOutOfBounds, place, reinterpret_cast<void*>(address), bytes,
               "byte %zu of %zu bytes of dynamic shared memory", dynamic, dynamic_bytes_);
        abandon();
    }
    shadow_->touch(offset, bytes, access, place, reinterpret_cast<const void*>(address));
}

void register_buffer(uint64_t begin, size_t bytes, const char* name, bool writable, bool starts_written) {
    Buffer buffer{begin, begin + bytes, name, writable, nullptr};
    if (writable) buffer.shadow = std::make_unique<Shadow>(Shadow::Space::kGlobal, bytes, starts_written);
    const auto behind = [](const Buffer& a, uint64_t address) { return a.begin < address; };
    buffers.insert(std::lower_bound(buffers.begin(), buffers.end(), begin, behind), std::move(buffer));
    last_buffer = nullptr;
}

void forget_buffers() {
    buffers.clear();
    last_buffer = nullptr;
}

Buffer* buffer_at(uint64_t address) {
    if (last_buffer != nullptr && address - last_buffer->begin < last_buffer->end - last_buffer->begin)
        return last_buffer;
    const auto before = [](uint64_t value, const Buffer& buffer) { return value < buffer.begin; };
    auto next = std::upper_bound(buffers.begin(), buffers.end(), address, before);
    if (next == buffers.begin() || address >= (next - 1)->end) return nullptr;
    return last_buffer = &*(next - 1);
}

void locate_module() {
    dl_iterate_phdr(find_module, nullptr);
}

uint64_t module_base() {
    return module_load;
}

void access_memory(uint64_t address, size_t bytes, uint8_t access, uint64_t place) {
    count_access(place);
    const void* pointer = reinterpret_cast<const void*>(address);
    if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && address % bytes != 0)
        report(Check::kMisaligned, place, pointer, bytes, "the address is no multiple of %zu", bytes);
    if (shared_memory.contains(address)) {
        if (machine.settings.traffic) log_access(address, bytes, true, place);
        shared_memory.access(address, bytes, access, place);
        return;
    }
    if (Buffer* buffer = buffer_at(address)) {
        if (address + bytes > buffer->end) {
            report(Check::kOutOfBounds, place, pointer, bytes, "reaches beyond the end of %s",
                   buffer->name.c_str());
            abandon();
        }
        if (machine.settings.traffic) log_access(address, bytes, false, place);
        if (buffer->writable) {
            buffer->shadow->touch(address - buffer->begin, bytes, access, place, pointer);
        } else if (access & kWrite) {
            report(Check::kReadOnlyWrite, place, pointer, bytes, "write into the input %s",
                   buffer->name.c_str());
            abandon();
        }
        return;
    }
    const uint64_t parameters = reinterpret_cast<uint64_t>(machine.parameters);
    if (access == kRead && (address - parameters < machine.parameter_bytes ||
                            address - module_start < module_end - module_start))
        return;
    report(Check::kOutOfBounds, place, pointer, bytes, "%s", neighbour(address).c_str());
    abandon();
}

}  // namespace cuda_emulator
