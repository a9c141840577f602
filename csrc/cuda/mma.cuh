// Products on tensor cores, and the loads that lay out their operands in registers.
//
// A warp computes D[m][n] += sum_k A[m][k] B[k][n] with m = 16, n = 8. Lane l = 4 g + t holds, of 16-bit
// elements with k = 16 (two elements to a register, the lower column or row in the lower half),
//
//   a[0..3]   A[g][2t, 2t+1]   A[g+8][2t, 2t+1]   A[g][2t+8, 2t+9]   A[g+8][2t+8, 2t+9]
//   b[0..1]   B[2t, 2t+1][g]   B[2t+8, 2t+9][g]
//   d[0..3]   D[g][2t]  D[g][2t+1]  D[g+8][2t]  D[g+8][2t+1]
//
// and of tf32 with k = 8: a = A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4]; b = B[t][g], B[t+4][g].
// (PTX ISA, "Matrix Fragments for mma.m16n8k16 / mma.m16n8k8"; sm_80 and later.)
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace prefix_fast::cuda {

// T is __half or __nv_bfloat16; products and sums are float32.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef PREFIX_FAST_EMULATE

template <>
inline void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    cuda_emulator::mma_f16(d, a, b);
}

template <>
inline void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    cuda_emulator::mma_bf16(d, a, b);
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    cuda_emulator::mma_tf32(d, a, b);
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
    cuda_emulator::ldmatrix(r, shared_row, 4, false);
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
    cuda_emulator::ldmatrix(r, shared_row, 4, true);
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
    cuda_emulator::ldmatrix(r, shared_row, 2, false);
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
    cuda_emulator::ldmatrix(r, shared_row, 2, true);
}

#else

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8; register i receives,
// of matrix i, elements 2t and 2t+1 of row g (transposed: of rows 2t and 2t+1 element g). An x2 load takes
// the addresses of lanes 0 to 15. The "memory" clobber keeps a load behind the stores and barriers that stand
// before it.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

#endif

// The nearest tf32, as the bits of a float32 of which tensor cores read the upper 19; ties go away from zero.
//
// Half a unit in the last place is added, and the rest is what they leave out: two instructions, where
// `cvt.rna` is three before sm_90 because it cuts it off. Infinity and NaN stay what they are.
__device__ __forceinline__ uint32_t to_tf32(float value) {
    const float power = __uint_as_float(__float_as_uint(value) & 0xFF800000u);
    return __float_as_uint(fmaf(power, 0x1p-11f, value));
}

// What they read of it.
__device__ __forceinline__ float tf32_of(uint32_t bits) {
    return __uint_as_float(bits & 0xFFFFE000u);
}

}  // namespace prefix_fast::cuda
