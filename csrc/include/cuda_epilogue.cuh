// From the sums of a tile to global memory: activations, and rows of eight numbers at a time.
#pragma once

#include "cuda_numbers.cuh"

/// The activations in the order of `kernels.activations.ACTIVATIONS`.
enum Activation { IDENTITY, GELU, GELU_TANH, RELU, SILU, SIGMOID, MISH, SOFTSIGN, ACTIVATIONS };

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

constexpr float ROOT_HALF = 0.70710678118654752f, ROOT_2_OVER_PI = 0.79788456080286536f, INVERSE_ROOT_2_PI = 0.39894228040143268f, CUBE = 0.044715f;

__device__ __forceinline__ float activate(int activation, float x) {
    switch (activation) {
        case GELU: return 0.5f * x * (1.0f + erff(x * ROOT_HALF));
        case GELU_TANH: return 0.5f * x * (1.0f + tanhf(ROOT_2_OVER_PI * (x + CUBE * x * x * x)));
        case RELU: return x <= 0.0f ? 0.0f : x;  // a NaN stays one
        case SILU: return x * sigmoid(x);
        case SIGMOID: return sigmoid(x);
        case MISH: return x * tanhf(softplus(x));
        case SOFTSIGN: return x / (1.0f + fabsf(x));
        default: return x;
    }
}

__device__ __forceinline__ float gelu_tanh_slope(float x) {
    float t = tanhf(ROOT_2_OVER_PI * (x + CUBE * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * ROOT_2_OVER_PI * (1.0f + 3.0f * CUBE * x * x);
}
__device__ __forceinline__ float mish_slope(float x) {
    float t = tanhf(softplus(x));
    return t + x * (1.0f - t * t) * sigmoid(x);
}
__device__ __forceinline__ float softsign_slope(float x) {
    float below = 1.0f + fabsf(x);
    return 1.0f / (below * below);
}

/// The derivative of the activation.
__device__ __forceinline__ float activation_slope(int activation, float x) {
    float s = 0.0f;
    switch (activation) {
        case GELU: return 0.5f * (1.0f + erff(x * ROOT_HALF)) + x * INVERSE_ROOT_2_PI * expf(-0.5f * x * x);
        case GELU_TANH: return gelu_tanh_slope(x);
        case RELU: return x <= 0.0f ? 0.0f : 1.0f;
        case SILU: s = sigmoid(x); return s * (1.0f + x * (1.0f - s));
        case SIGMOID: s = sigmoid(x); return s * (1.0f - s);
        case MISH: return mish_slope(x);
        case SOFTSIGN: return softsign_slope(x);
        default: return 1.0f;
    }
}

/// Reads `there` of eight numbers; the others are 0. `whole`: all eight are there and at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void load_8(float (&values)[8], const uint16_t* from, int there, bool whole) {
    if (whole) {
        uint4 packed = load_whole<uint4>(from);
        uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = to_float(T{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < there ? to_float(T{from[i]}) : 0.0f;
}

/// Rounds and writes `there` of eight numbers.
template <class T>
__device__ __forceinline__ void store_8(uint16_t* to, const float (&values)[8], int there, bool whole) {
    if (whole) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] = from_float<T>(values[2 * i]).bits | static_cast<uint32_t>(from_float<T>(values[2 * i + 1]).bits) << 16;
        store_whole(to, uint4{words[0], words[1], words[2], words[3]});
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < there) to[i] = from_float<T>(values[i]).bits;
}
