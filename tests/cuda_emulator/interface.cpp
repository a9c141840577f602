// What Python calls (cuda_harness.py holds the twin of every struct), and the few functions of CUDA's
// runtime.

#include <algorithm>
#include <cstring>

#include "cuda_runtime.h"
#include "memory.h"
#include "traffic.h"

#define CUDA_EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

using namespace cuda_emulator;

// A variable of the module's thread-local block.
CUDA_EMULATOR_EXPORT void cuda_emulator_add_shared(uint64_t offset, uint64_t bytes, const char* name) {
    locate_module();
    shared_memory.add(offset, bytes, name);
}

CUDA_EMULATOR_EXPORT void cuda_emulator_begin(const Settings* settings) {
    machine.settings = *settings;
    machine.random.state = settings->seed;
    machine.findings.clear();
    machine.counters = Counters{};
    forget_traffic();
    forget_buffers();
}

CUDA_EMULATOR_EXPORT void cuda_emulator_add_buffer(uint64_t begin, uint64_t bytes, const char* name,
                                                   int writable, int starts_written) {
    register_buffer(begin, bytes, name, writable != 0, starts_written != 0);
}

CUDA_EMULATOR_EXPORT int cuda_emulator_findings(const Finding** findings) {
    *findings = machine.findings.data();
    return static_cast<int>(machine.findings.size());
}

CUDA_EMULATOR_EXPORT void cuda_emulator_counters(Counters* counters) {
    *counters = machine.counters;
}

CUDA_EMULATOR_EXPORT int cuda_emulator_traffic(Traffic* places, int room) {
    const std::vector<Traffic> all = traffic_by_place();
    std::copy_n(all.begin(), std::min<size_t>(all.size(), static_cast<size_t>(room)), places);
    return static_cast<int>(all.size());
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    Buffer* buffer = buffer_at(reinterpret_cast<uint64_t>(memory));
    if (buffer == nullptr || reinterpret_cast<uint64_t>(memory) + bytes > buffer->end || !buffer->writable) {
        report(Check::kOutOfBounds, CUDA_EMULATOR_PLACE, memory, bytes,
               "cudaMemsetAsync outside of every writable buffer");
        return cudaErrorInvalidValue;
    }
    std::memset(memory, value, bytes);
    buffer->shadow->fill(reinterpret_cast<uint64_t>(memory) - buffer->begin, bytes);
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "an error of the emulator";
}

extern "C" const char* prefix_fast_error_name(int error) {
    return cudaGetErrorString(error);
}
