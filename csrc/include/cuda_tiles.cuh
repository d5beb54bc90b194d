// Tiles of 16-bit numbers in shared memory, and the product of two tiles by the warps of a block.
//
// A product C[m, n] = sum over k of A[m, k] B[k, n] is computed in steps of DEPTH. A tile stores either k or the other index contiguously:
// "inner" tiles are [m or n][k], "outer" tiles are [k][m or n]. ldmatrix reads both, with .trans for the outer ones.
#pragma once

#include "cuda_warp.cuh"

/// Rows of 16-bit numbers in global memory.
struct Matrix {
    const uint16_t* data;
    int64_t stride;  // numbers from row to row
    int columns;
    int aligned;  // 1: data and all rows start at multiples of 16 bytes
};

constexpr int DEPTH = 32;

/// What a block computes at once, and with how many threads. A warp has WARP_ROWS x WARP_COLUMNS of it.
struct Large {
    static constexpr int ROWS = 128, COLUMNS = 128, WARP_ROWS = 64, WARP_COLUMNS = 32, STAGES = 4, THREADS = 256;
};
struct Small {
    static constexpr int ROWS = 64, COLUMNS = 64, WARP_ROWS = 32, WARP_COLUMNS = 32, STAGES = 4, THREADS = 128;
};

/// Where a tile keeps the eight numbers `chunk` of a row. Chunks change places from row to row, so that eight rows of a matrix lie in different banks.
template <int COLUMNS>
__device__ __forceinline__ int place_in_tile(int row, int chunk) {
    constexpr int CHUNKS = COLUMNS / 8;
    static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "rows of 64 bytes, or whole lines of 128 bytes");
    if constexpr (CHUNKS == 4) return (row * 4 + (chunk ^ (row >> 1 & 3))) * 8;
    return (row * CHUNKS + (chunk ^ (row & 7))) * 8;
}

/// The numbers [0, there) at `from`, then zeros; for rows that cp.async cannot read.
__device__ __forceinline__ uint4 gather_chunk(const uint16_t* from, int there) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t low = 2 * i < there ? from[2 * i] : 0, high = 2 * i + 1 < there ? from[2 * i + 1] : 0;
        words[i] = low | high << 16;
    }
    return uint4{words[0], words[1], words[2], words[3]};
}

/// The rows from `begin` on of a matrix that has `end` rows.
struct RowsFrom {
    int begin, end;
    __device__ __forceinline__ int64_t operator()(int i) const { return begin + i < end ? begin + i : -1; }
};

/// Fills a tile [ROWS][COLUMNS] with the columns from `column` on. `row_of(i)` is the row of the matrix for row i of the tile, negative for zeros.
template <int ROWS, int COLUMNS, int THREADS, class RowOf>
__device__ __forceinline__ void load_tile(uint16_t* tile, const Matrix& matrix, int column, RowOf row_of) {
    constexpr int CHUNKS = COLUMNS / 8;
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies as many chunks");
#pragma unroll
    for (int copied = 0; copied < ROWS * CHUNKS; copied += THREADS) {
        int i = copied + static_cast<int>(threadIdx.x), row = i / CHUNKS, chunk = i % CHUNKS;
        int64_t source = row_of(row);
        int left = matrix.columns - column - chunk * 8, there = source < 0 || left < 0 ? 0 : left < 8 ? left : 8;
        const uint16_t* from = there == 0 ? matrix.data : matrix.data + source * matrix.stride + column + chunk * 8;
        uint16_t* to = tile + place_in_tile<COLUMNS>(row, chunk);
        if (matrix.aligned) {
            copy_async(to, from, there * 2);
        } else {
            store_whole(to, gather_chunk(from, there));
        }
    }
}

/// The accumulators of a thread.
template <class C>
struct Sums {
    static constexpr int TALL = C::WARP_ROWS / 16, WIDE = C::WARP_COLUMNS / 8;
    float value[TALL][WIDE][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < TALL; ++m)
#pragma unroll
            for (int n = 0; n < WIDE; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) value[m][n][i] = 0;
    }
};

/// The first row and column of this thread's warp in the tile.
template <class C>
__device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 % (C::ROWS / C::WARP_ROWS) * C::WARP_ROWS;
}
template <class C>
__device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x) / 32 / (C::ROWS / C::WARP_ROWS) * C::WARP_COLUMNS;
}

/// A[16, 16] at (m, k) as a fragment.
template <class C, bool OUTER>
__device__ __forceinline__ void load_a(uint32_t (&fragment)[4], const uint16_t* tile, int m, int k) {
    int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (OUTER) {
        load_matrices<true>(fragment, tile + place_in_tile<C::ROWS>(k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2));
    } else {
        load_matrices<false>(fragment, tile + place_in_tile<DEPTH>(m + lane % 16, k / 8 + lane / 16));
    }
}

/// B[16, 16] at (k, n) as two fragments of eight columns.
template <class C, bool OUTER>
__device__ __forceinline__ void load_b(uint32_t (&fragments)[4], const uint16_t* tile, int k, int n) {
    int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (OUTER) {
        load_matrices<true>(fragments, tile + place_in_tile<C::COLUMNS>(k + lane % 16, n / 8 + lane / 16));
    } else {
        load_matrices<false>(fragments, tile + place_in_tile<DEPTH>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
    }
}

/// Adds the product of two tiles of depth DEPTH to the sums of this warp.
template <class C, class T, bool A_OUTER, bool B_OUTER>
__device__ __forceinline__ void multiply_tiles(Sums<C>& sums, const uint16_t* a_tile, const uint16_t* b_tile) {
    const int row = warp_row<C>(), column = warp_column<C>();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        uint32_t b[Sums<C>::WIDE / 2][4];
#pragma unroll
        for (int n = 0; n < Sums<C>::WIDE / 2; ++n) load_b<C, B_OUTER>(b[n], b_tile, k, column + n * 16);
#pragma unroll
        for (int m = 0; m < Sums<C>::TALL; ++m) {
            uint32_t a[4];
            load_a<C, A_OUTER>(a, a_tile, row + m * 16, k);
#pragma unroll
            for (int n = 0; n < Sums<C>::WIDE; ++n) multiply_accumulate(T{}, sums.value[m][n], a, b[n / 2] + n % 2 * 2);
        }
    }
}

/// The sums of all warps as floats in shared memory, [ROWS][COLUMNS], for an epilogue that reads them row by row.
template <class C>
struct Stage {
    static constexpr int STRIDE = C::COLUMNS + 8;  // eight rows that a warp writes at once lie in different banks
    static constexpr size_t BYTES = sizeof(float) * C::ROWS * STRIDE;

    __device__ __forceinline__ static void write(float* stage, const Sums<C>& sums) {
        int lane = static_cast<int>(threadIdx.x) % 32;
        const int row = warp_row<C>() + lane / 4, column = warp_column<C>() + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < Sums<C>::TALL; ++m)
#pragma unroll
            for (int n = 0; n < Sums<C>::WIDE; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float* to = stage + (row + m * 16 + half * 8) * STRIDE + column + n * 8;
                    store_whole(to, float2{sums.value[m][n][half * 2], sums.value[m][n][half * 2 + 1]});
                }
    }
};

/// Shared memory of the tiles of all stages.
template <class C>
constexpr size_t TILES_BYTES = sizeof(uint16_t) * C::STAGES * (C::ROWS + C::COLUMNS) * DEPTH;
/// Shared memory of a product: its tiles, and the sums in the same place afterwards.
template <class C>
constexpr size_t PRODUCT_BYTES = TILES_BYTES<C> > Stage<C>::BYTES ? TILES_BYTES<C> : Stage<C>::BYTES;

/// Runs `steps` steps through the pipeline: `load(step, a_tile, b_tile)` starts the copies of a step, `multiply(step, a_tile, b_tile)` uses them.
/// Afterwards nothing is on its way and every warp is done with the tiles.
template <class C, class Load, class Multiply>
__device__ __forceinline__ void run_pipeline(uint16_t* tiles, int steps, Load load, Multiply multiply) {
    constexpr int A = C::ROWS * DEPTH, BOTH = (C::ROWS + C::COLUMNS) * DEPTH;
#pragma unroll
    for (int step = 0; step < C::STAGES - 1; ++step) {
        if (step < steps) load(step, tiles + step * BOTH, tiles + step * BOTH + A);
        commit_async();
    }
    for (int step = 0; step < steps; ++step) {
        wait_async<C::STAGES - 2>();
        __syncthreads();  // the copies of this step are there for all, and all are done with the stage that is loaded next
        int ahead = step + C::STAGES - 1;
        uint16_t *next = tiles + ahead % C::STAGES * BOTH, *now = tiles + step % C::STAGES * BOTH;
        if (ahead < steps) load(ahead, next, next + A);
        commit_async();
        multiply(step, now, now + A);
    }
    wait_async<0>();
    __syncthreads();
}
