// Weight gradients: out[group] = sum over the group's places p of left[p]^T right[source of p]; zeros for a group without rows.
#pragma once

#include "../include/cuda_epilogue.cuh"
#include "../include/cuda_tiles.cuh"
#include "groups.cuh"

struct OuterProduct {
    Matrix left;  // [places, height]
    Matrix right;
    int64_t right_rows;
    const int64_t* order;  // right's row at place p is order[p] / order_divisor. No pointer: p itself
    int order_divisor;
    const int* offsets;
    int groups;
    uint16_t* out;  // [groups, height, width]
};

template <class C, class T>
__global__ void __launch_bounds__(C::THREADS) multiply_outer(OuterProduct p) {
    unsigned char* memory = dynamic_shared();
    const int group = static_cast<int>(blockIdx.z), column = static_cast<int>(blockIdx.x) * C::COLUMNS, row = static_cast<int>(blockIdx.y) * C::ROWS;
    const int begin = p.offsets[group], end = p.offsets[group + 1];
    auto load = [&](int step, uint16_t* a, uint16_t* b) {
        const int first = begin + step * DEPTH;
        load_tile<DEPTH, C::ROWS, C::THREADS>(a, p.left, row, RowsFrom{first, end});
        load_tile<DEPTH, C::COLUMNS, C::THREADS>(b, p.right, column, [&](int i) -> int64_t {
            if (first + i >= end) return -1;
            return p.order == nullptr ? first + i : row_of_choice(p.order[first + i], p.order_divisor, p.right_rows);
        });
    };
    Sums<C> sums;
    sums.clear();
    run_pipeline<C>(reinterpret_cast<uint16_t*>(memory), (end - begin + DEPTH - 1) / DEPTH, load,
                    [&](int, const uint16_t* a, const uint16_t* b) { multiply_tiles<C, T, true, true>(sums, a, b); });
    float* stage = reinterpret_cast<float*>(memory);
    Stage<C>::write(stage, sums);
    __syncthreads();
    constexpr int CHUNKS = C::COLUMNS / 8;
    for (int at = static_cast<int>(threadIdx.x); at < C::ROWS * CHUNKS; at += C::THREADS) {
        int m = row + at / CHUNKS, n = column + at % CHUNKS * 8, there = p.right.columns - n;
        if (m >= p.left.columns || there <= 0) continue;
        const float* from = stage + at / CHUNKS * Stage<C>::STRIDE + at % CHUNKS * 8;
        float4 low = load_whole<float4>(from), high = load_whole<float4>(from + 4);
        float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        int64_t to = (static_cast<int64_t>(group) * p.left.columns + m) * p.right.columns + n;
        store_8<T>(p.out + to, v, there, there >= 8 && p.right.columns % 8 == 0);
    }
}

template <class C, class T>
int start_outer(const OuterProduct& p, cudaStream_t stream) {
    dim3 grid(static_cast<unsigned>((p.right.columns + C::COLUMNS - 1) / C::COLUMNS), static_cast<unsigned>((p.left.columns + C::ROWS - 1) / C::ROWS),
              static_cast<unsigned>(p.groups));
    return launch("multiply_outer", multiply_outer<C, T>, grid, dim3(C::THREADS), PRODUCT_BYTES<C>, stream, p);
}
