// The instructions that C++ has no words for: asynchronous copies, matrix loads and products of a warp.
#pragma once

#include "cuda_numbers.cuh"

#ifdef __CUDACC__

/// Copies the first `bytes` (at most 16) at `global` to the 16 bytes at `shared` and zeroes the rest. Both are multiples of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
    auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(__cvta_generic_to_global(global)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_async() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/// Waits until at most N of this thread's groups are on their way.
template <int N>
__device__ __forceinline__ void wait_async() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

#define LDMATRIX(kind, registers, ...)                                                                                             \
    if constexpr (TRANSPOSED)                                                                                                      \
        asm volatile("ldmatrix.sync.aligned.m8n8." kind ".trans.shared.b16 " registers ";\n" : __VA_ARGS__ : "r"(from) : "memory"); \
    else                                                                                                                           \
        asm volatile("ldmatrix.sync.aligned.m8n8." kind ".shared.b16 " registers ";\n" : __VA_ARGS__ : "r"(from) : "memory")

/// One, two or four 8x8 matrices; lane 8j+i gives the address of row i of matrix j, and all lanes give some address.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[1], const void* row) {
    auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    LDMATRIX("x1", "{%0}, [%1]", "=r"(r[0]));
}
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void* row) {
    auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    LDMATRIX("x2", "{%0,%1}, [%2]", "=r"(r[0]), "=r"(r[1]));
}
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
    auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    LDMATRIX("x4", "{%0,%1,%2,%3}, [%4]", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]));
}

#undef LDMATRIX

#define MMA_16_8_16(name)                                                                                                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

/// d[16, 8] += a[16, 16] b[16, 8].
__device__ __forceinline__ void multiply_accumulate(BFloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) { MMA_16_8_16("bf16"); }
__device__ __forceinline__ void multiply_accumulate(Float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) { MMA_16_8_16("f16"); }

#undef MMA_16_8_16

#else

inline void copy_async(void* shared, const void* global, int bytes) { emulation::copy_async(shared, global, bytes); }
inline void commit_async() { emulation::commit_async(); }
template <int N>
inline void wait_async() {
    emulation::wait_async(N);
}
template <bool TRANSPOSED, int COUNT>
inline void load_matrices(uint32_t (&r)[COUNT], const void* row) {
    static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4, "ldmatrix loads one, two or four matrices");
    emulation::load_matrices(COUNT, TRANSPOSED, row, r);
}
inline void multiply_accumulate(BFloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    emulation::multiply_accumulate(emulation::Number::bfloat16, d, a, b);
}
inline void multiply_accumulate(Float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    emulation::multiply_accumulate(emulation::Number::float16, d, a, b);
}

#endif
