// What stands between the products of the hidden layer's backward: the activation, the weights pi, and the sums of the biases.
#pragma once

#include "../grouped_gemm/groups.cuh"
#include "../include/cuda_epilogue.cuh"

struct ActivationBackward {
    const uint16_t* grad;  // of the hidden layer
    const uint16_t* up;
    const uint16_t* gate;  // or no pointer
    uint16_t* grad_up;
    uint16_t* grad_gate;  // where there is a gate
    int64_t count;
    int activation;
    int aligned;  // 1: all start at multiples of 16 bytes
};

constexpr int FLAT_THREADS = 256;

template <class T>
__global__ void __launch_bounds__(FLAT_THREADS) activation_backward(ActivationBackward p) {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * FLAT_THREADS + threadIdx.x) * 8;
    if (at >= p.count) return;
    const int there = p.count - at < 8 ? static_cast<int>(p.count - at) : 8;
    const bool whole = there == 8 && p.aligned;
    float grad[8], up[8], gate[8];
    load_8<T>(grad, p.grad + at, there, whole);
    load_8<T>(up, p.up + at, there, whole);
    if (p.gate == nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) up[i] = grad[i] * activation_slope(p.activation, up[i]);
        store_8<T>(p.grad_up + at, up, there, whole);
        return;
    }
    load_8<T>(gate, p.gate + at, there, whole);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float through_gate = grad[i] * up[i] * activation_slope(p.activation, gate[i]);
        up[i] = grad[i] * activate(p.activation, gate[i]);
        gate[i] = through_gate;
    }
    store_8<T>(p.grad_up + at, up, there, whole);
    store_8<T>(p.grad_gate + at, gate, there, whole);
}

struct LoreGradients {
    const uint16_t* u;       // [places, rank], x A
    const uint16_t* grad_z;  // [places, rank]
    const float* pi;         // of each choice
    const int64_t* order;    // the choice at each place
    int64_t places;
    int rank;
    uint16_t* z;       // pi * u
    uint16_t* grad_u;  // pi * grad_z
    float* grad_pi;    // of each choice: the inner product of grad_z and u
};

/// One warp has one place.
template <class T>
__global__ void __launch_bounds__(FLAT_THREADS) lore_gradients(LoreGradients p) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * (FLAT_THREADS / 32) + threadIdx.x / 32;
    if (place >= p.places) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t choice = row_of_choice(p.order[place], 1, p.places);
    const float pi = choice < 0 ? 0.0f : p.pi[choice];
    float product = 0.0f;
    for (int i = lane; i < p.rank; i += 32) {
        const int64_t at = place * p.rank + i;
        float u = to_float(T{p.u[at]}), grad = to_float(T{p.grad_z[at]});
        product += grad * u;
        p.z[at] = from_float<T>(pi * u).bits;
        p.grad_u[at] = from_float<T>(pi * grad).bits;
    }
    for (unsigned step = 16; step > 0; step /= 2) product += shuffle_xor(product, step);
    if (lane == 0 && choice >= 0) p.grad_pi[choice] = product;
}

struct ColumnSums {
    const uint16_t* x;  // [rows, width]
    int width;
    const int* offsets;
    int groups;
    uint16_t* out;  // [groups, width]
};

/// A block has 32 columns of one group, a warp every eighth row of it; the sums of the warps are added in their order.
template <class T>
__global__ void __launch_bounds__(FLAT_THREADS) column_sums(ColumnSums p) {
    auto* memory = reinterpret_cast<float*>(dynamic_shared());
    constexpr int WARPS = FLAT_THREADS / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int column = static_cast<int>(blockIdx.x) * 32 + lane, group = static_cast<int>(blockIdx.y);
    float sum = 0.0f;
    for (int row = p.offsets[group] + warp; row < p.offsets[group + 1]; row += WARPS)
        if (column < p.width) sum += to_float(T{p.x[static_cast<int64_t>(row) * p.width + column]});
    memory[warp * 32 + lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= p.width) return;
    for (int other = 1; other < WARPS; ++other) sum += memory[other * 32 + lane];
    p.out[static_cast<int64_t>(group) * p.width + column] = from_float<T>(sum).bits;
}
