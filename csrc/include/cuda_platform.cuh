// The one place that knows whether nvcc compiles for a GPU or a C++ compiler for the emulation.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

/// Starts `kernel`; returns a cudaError_t, 0 where it was started.
template <class... P, class... A>
int launch(const char*, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... arguments) {
    if (shared_bytes > 48 * 1024) {
        cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (status != cudaSuccess) return static_cast<int>(status);
    }
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

constexpr unsigned ALL_LANES = 0xffffffffu;

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, unsigned lanes) {
    return __shfl_xor_sync(ALL_LANES, value, lanes);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, unsigned lanes) {
    return __shfl_up_sync(ALL_LANES, value, lanes);
}
template <class T>
__device__ __forceinline__ T shuffle_from(T value, unsigned source) {
    return __shfl_sync(ALL_LANES, value, source);
}
__device__ __forceinline__ unsigned lanes_where(bool yes) { return __ballot_sync(ALL_LANES, yes); }
__device__ __forceinline__ unsigned lanes_with(int value) { return __match_any_sync(ALL_LANES, value); }

#else

#include "../emulation/cuda_emulation.hpp"

template <class... P, class... A>
int launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A... arguments) {
    return emulation::launch(name, kernel, grid, block, shared_bytes, arguments...);
}

inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(emulation::dynamic_shared_memory()); }

#endif

/// Loads or stores a whole uint4, float4 or float2 at a multiple of its size.
template <class T>
__device__ __forceinline__ T load_whole(const void* from) {
#ifndef __CUDACC__
    emulation::touch(from, sizeof(T), false);
#endif
    return *static_cast<const T*>(from);
}
template <class T>
__device__ __forceinline__ void store_whole(void* to, T value) {
#ifndef __CUDACC__
    emulation::touch(to, sizeof(T), true);
#endif
    *static_cast<T*>(to) = value;
}
