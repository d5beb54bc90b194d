// 16-bit numbers and their conversions. Everything is computed in float.
#pragma once

#include "cuda_platform.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

#ifdef __CUDACC__
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
    return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
    return Float16{__half_as_ushort(__float2half_rn(x))};
}
#else
#include <cstring>

template <class To, class From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float to_float(BFloat16 x) { return same_bits<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Float16 x) {
    uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ff;
    if (exponent == 31) return same_bits<float>(sign | 0x7f800000 | fraction << 13);
    float magnitude = exponent == 0 ? static_cast<float>(fraction) * 0x1p-24f : same_bits<float>((exponent + 112) << 23 | fraction << 13);
    return sign ? -magnitude : magnitude;
}

template <class T>
inline T from_float(float x);

template <>
inline BFloat16 from_float<BFloat16>(float x) {
    auto bits = same_bits<uint32_t>(x);
    if (x != x) return BFloat16{0x7fff};
    return BFloat16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float x) {
    auto sign = static_cast<uint16_t>(same_bits<uint32_t>(x) >> 16 & 0x8000);
    float magnitude = std::fabs(x);
    if (x != x) return Float16{0x7fff};
    if (magnitude >= 65520.0f) return Float16{static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x1p-14f) return Float16{static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)))};
    auto bits = same_bits<uint32_t>(magnitude) - (112u << 23);
    return Float16{static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
}
#endif
