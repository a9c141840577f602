// One way to launch a kernel: PREFIX_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...).
//
// It returns cudaSuccess, or the error, which is then no longer the runtime's last one. A kernel that is a
// template of several arguments stands in parentheses. An empty grid launches nothing.
#pragma once

#include <cstddef>

#include <cuda_runtime.h>

#define PREFIX_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ::prefix_fast::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream, ##__VA_ARGS__)

namespace prefix_fast::cuda {

#ifdef PREFIX_FAST_EMULATE

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, cudaStream_t, const Arguments&... arguments) {
    return cuda_emulator::launch_kernel(name, kernel, grid, block, shared_bytes, arguments...);
}

#else

constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
    if (size_t(grid.x) * grid.y * grid.z == 0) return cudaSuccess;
    if (shared_bytes > kSharedBytesWithoutAsking) {
        const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                         static_cast<int>(shared_bytes));
        if (refused != cudaSuccess) {
            cudaGetLastError();
            return refused;
        }
    }
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    return cudaGetLastError();
}

#endif

}  // namespace prefix_fast::cuda
