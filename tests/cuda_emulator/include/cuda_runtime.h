// What our launchers use of CUDA's runtime.
#pragma once

#include <cstddef>

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719;

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
