// The fragments of mma and ldmatrix, as they are: lane l's registers stand in row l of a matrix in global
// memory.

#include "launch.cuh"
#include "memory.cuh"
#include "mma.cuh"

using namespace prefix_fast::cuda;

namespace {

template <typename T>
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* d) {
    const int lane = threadIdx.x;
    uint32_t left[4], right[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) left[i] = a[4 * lane + i];
    for (int i = 0; i < 2; ++i) right[i] = b[2 * lane + i];
    for (int i = 0; i < 4; ++i) sums[i] = d[4 * lane + i];
    if constexpr (sizeof(T) == 4)
        mma_m16n8k8_tf32(sums, left, right);
    else
        mma_m16n8k16<T>(sums, left, right);
    for (int i = 0; i < 4; ++i) d[4 * lane + i] = sums[i];
}

// What tensor cores read of numbers that have been rounded for them.
__global__ void round_numbers(const float* in, float* out) {
    out[threadIdx.x] = tf32_of(to_tf32(in[threadIdx.x]));
}

// Lane l gives the address of row `order[l]` of a tile of rows of `pitch` bytes.
template <int kMatrices, bool kTransposed>
__global__ void load(const uint4* rows, const int* order, uint32_t* registers, int pitch) {
    const int lane = threadIdx.x;
    store_shared_16(dynamic_shared + pitch * lane, rows[lane]);
    __syncthreads();
    const void* row = dynamic_shared + pitch * order[lane];
    if constexpr (kMatrices == 4) {
        uint32_t four[4];
        if constexpr (kTransposed)
            ldmatrix_x4_trans(four, row);
        else
            ldmatrix_x4(four, row);
        for (int i = 0; i < 4; ++i) registers[4 * lane + i] = four[i];
    } else {
        uint32_t two[2];
        if constexpr (kTransposed)
            ldmatrix_x2_trans(two, row);
        else
            ldmatrix_x2(two, row);
        for (int i = 0; i < 2; ++i) registers[2 * lane + i] = two[i];
    }
}

// `kind` of a shuffle on lanes of groups of `width`.
__global__ void shuffle(const float* in, float* out, int kind, int operand, int width) {
    const int lane = threadIdx.x;
    const float value = in[lane];
    float result = __shfl_sync(0xffffffffu, value, operand, width);
    if (kind == 1) result = __shfl_xor_sync(0xffffffffu, value, operand, width);
    if (kind == 2) result = __shfl_up_sync(0xffffffffu, value, operand, width);
    if (kind == 3) result = __shfl_down_sync(0xffffffffu, value, operand, width);
    out[lane] = result;
}

__global__ void vote(const float* in, uint32_t* out) {
    const int lane = threadIdx.x;
    const uint32_t mask = lane < 20 ? 0x000fffffu : 0xfff00000u;  // two parts of the warp vote apart
    out[lane] = __ballot_sync(mask, in[lane] > 0);
    out[32 + lane] = __any_sync(mask, in[lane] > 0);
    out[64 + lane] = __all_sync(mask, in[lane] > 0);
}

// Reads of 4 bytes with a stride over the lanes, from shared and from global memory.
__global__ void strided(const float* in, float* out, int stride) {
    float* tile = reinterpret_cast<float*>(dynamic_shared);
    for (int i = threadIdx.x; i < 32 * 32; i += 32) tile[i] = 1.0f;  // line: fill
    __syncthreads();
    out[threadIdx.x] = tile[stride * threadIdx.x] +  // line: shared
                       in[stride * threadIdx.x];     // line: global
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int multiply_f16(const uint32_t* a, const uint32_t* b, float* d) {
    return PREFIX_FAST_LAUNCH(multiply<__half>, 1, 32, 0, nullptr, a, b, d);
}
API int multiply_bf16(const uint32_t* a, const uint32_t* b, float* d) {
    return PREFIX_FAST_LAUNCH(multiply<__nv_bfloat16>, 1, 32, 0, nullptr, a, b, d);
}
API int multiply_tf32(const uint32_t* a, const uint32_t* b, float* d) {
    return PREFIX_FAST_LAUNCH(multiply<float>, 1, 32, 0, nullptr, a, b, d);
}
API int round_to_tf32(const float* in, float* out) {
    return PREFIX_FAST_LAUNCH(round_numbers, 1, 32, 0, nullptr, in, out);
}
API int load_matrices(const uint4* rows, const int* order, uint32_t* registers, int64_t matrices,
                      int64_t transposed, int64_t pitch) {
    const int kind = static_cast<int>(2 * (matrices == 4) + transposed), bytes = static_cast<int>(pitch);
    if (kind == 0)
        return PREFIX_FAST_LAUNCH((load<2, false>), 1, 32, 32 * pitch, nullptr, rows, order, registers,
                                  bytes);
    if (kind == 1)
        return PREFIX_FAST_LAUNCH((load<2, true>), 1, 32, 32 * pitch, nullptr, rows, order, registers, bytes);
    if (kind == 2)
        return PREFIX_FAST_LAUNCH((load<4, false>), 1, 32, 32 * pitch, nullptr, rows, order, registers,
                                  bytes);
    return PREFIX_FAST_LAUNCH((load<4, true>), 1, 32, 32 * pitch, nullptr, rows, order, registers, bytes);
}
API int shuffle_lanes(const float* in, float* out, int64_t kind, int64_t operand, int64_t width) {
    return PREFIX_FAST_LAUNCH(shuffle, 1, 32, 0, nullptr, in, out, int(kind), int(operand), int(width));
}
API int vote_lanes(const float* in, uint32_t* out) {
    return PREFIX_FAST_LAUNCH(vote, 1, 32, 0, nullptr, in, out);
}
API int read_strided(const float* in, float* out, int64_t stride) {
    return PREFIX_FAST_LAUNCH(strided, 1, 32, 32 * 32 * 4, nullptr, in, out, int(stride));
}
API int launch_only(float* out, int64_t blocks_y, int64_t threads, int64_t shared_bytes) {
    return PREFIX_FAST_LAUNCH(vote, dim3(1, static_cast<unsigned>(blocks_y)), static_cast<unsigned>(threads),
                              shared_bytes, nullptr, out, reinterpret_cast<uint32_t*>(out));
}
