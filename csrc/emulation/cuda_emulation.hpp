// What a .cu file needs of CUDA, so that a C++ compiler builds it and a CPU runs it. See csrc/README.md.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

using cudaStream_t = void*;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};

namespace emulation {

dim3 thread_index();
dim3 block_index();
dim3 block_dimensions();
dim3 grid_dimensions();
void* dynamic_shared_memory();

/// Runs `body(context)` once for each thread of each block. Returns 0, or 1 where something was reported. Reads of [context, +bytes) are arguments.
int run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context, size_t bytes);

void block_barrier();
void warp_barrier();
/// A gather of one 64-bit value of each lane; every lane gets all 32.
void exchange(const char* operation, uint64_t value, uint64_t (&all)[32]);
unsigned lane();

void copy_async(void* shared, const void* global, int bytes_there);
void commit_async();
void wait_async(int groups_left);

enum class Number { bfloat16, float16 };
void load_matrices(int count, bool transposed, const void* row, uint32_t* registers);
void multiply_accumulate(Number number, float* d, const uint32_t* a, const uint32_t* b);

/// An access that the compiler may split, where a device would not: checked as a whole before it happens.
void touch(const void* address, size_t bytes, bool write);
/// An atomic read-modify-write of `bytes` is about to happen.
void touch_atomically(void* address, size_t bytes);

template <class... P, class... A>
int launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... arguments) {
    struct Context {
        void (*kernel)(P...);
        std::tuple<P...> arguments;
    } context{kernel, std::tuple<P...>(arguments...)};
    auto body = [](void* given) {
        auto* call = static_cast<Context*>(given);
        std::apply(call->kernel, call->arguments);
    };
    return run(name, grid, block, shared_bytes, body, &context, sizeof context);
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_dimensions())
#define gridDim (emulation::grid_dimensions())

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }

namespace emulation {
template <class T>
T shuffled(const char* operation, T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "shuffles carry at most 64 bits");
    union {
        uint64_t bits;
        T value;
    } in{0}, out{0};
    in.value = value;
    uint64_t all[32];
    exchange(operation, in.bits, all);
    out.bits = all[source & 31];
    return out.value;
}
}  // namespace emulation

// Every lane takes part: another mask than the full one is refused by the types, there is no parameter for it.
template <class T>
T shuffle_xor(T value, unsigned lanes) {
    return emulation::shuffled("shuffle_xor", value, emulation::lane() ^ lanes);
}
template <class T>
T shuffle_up(T value, unsigned lanes) {
    return emulation::shuffled("shuffle_up", value, emulation::lane() < lanes ? emulation::lane() : emulation::lane() - lanes);
}
template <class T>
T shuffle_from(T value, unsigned source) {
    return emulation::shuffled("shuffle_from", value, source);
}
inline unsigned lanes_where(bool yes) {
    uint64_t all[32];
    emulation::exchange("ballot", yes, all);
    unsigned mask = 0;
    for (unsigned i = 0; i < 32; ++i) mask |= static_cast<unsigned>(all[i] != 0) << i;
    return mask;
}
inline unsigned lanes_with(int value) {
    uint64_t all[32];
    emulation::exchange("match_any", static_cast<uint32_t>(value), all);
    unsigned mask = 0;
    for (unsigned i = 0; i < 32; ++i) mask |= static_cast<unsigned>(all[i] == static_cast<uint32_t>(value)) << i;
    return mask;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T>
__attribute__((no_sanitize("thread"))) inline T atomicAdd(T* address, T value) {
    emulation::touch_atomically(address, sizeof(T));
    T before = *address;
    *address = before + value;
    return before;
}
__attribute__((no_sanitize("thread"))) inline unsigned atomicOr(unsigned* address, unsigned value) {
    emulation::touch_atomically(address, sizeof(unsigned));
    unsigned before = *address;
    *address = before | value;
    return before;
}
