// What the runtime, linked statically, says of this machine. Nothing here makes a context or leaves an error
// behind.
#include <cuda_runtime_api.h>

#define PREFIX_FAST_TEXT_OF(text) #text
#define PREFIX_FAST_TEXT(text) PREFIX_FAST_TEXT_OF(text)

extern "C" const char* prefix_fast_error_name(int error) {
    return cudaGetErrorName(static_cast<cudaError_t>(error));
}

// The architectures whose machine code is linked in, as "80_90".
extern "C" const char* prefix_fast_architectures() {
    return PREFIX_FAST_TEXT(PREFIX_FAST_CUDA_ARCHITECTURES);
}

// Versions as 1000 · major + 10 · minor; 0: no driver.
extern "C" int prefix_fast_driver_version() {
    int version = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess) cudaGetLastError();
    return version;
}

extern "C" int prefix_fast_runtime_version() {
    return CUDART_VERSION;
}

// The device that a stream belongs to; -1 where the driver cannot tell.
extern "C" int prefix_fast_device_of_stream(void* stream) {
    int device = -1;
#if CUDART_VERSION >= 12080
    if (cudaStreamGetDevice(static_cast<cudaStream_t>(stream), &device) != cudaSuccess) {
        cudaGetLastError();
        return -1;
    }
#endif
    return device;
}
