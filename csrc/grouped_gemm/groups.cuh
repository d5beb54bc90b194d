// Rows sorted by group: where each group begins, and which tiles of rows it has. Computed on the device from the counts, whatever they are.
#pragma once

#include "../include/cuda_platform.cuh"

/// What `group_offsets` writes, `3 * (groups + 2)` numbers: the first row of each group, then the first tile of 64 rows, then of 128.
/// Group number `groups` has the rows that no group has. Offsets never decrease and never exceed the rows, for any counts.
struct Groups {
    const int* offsets;
    int groups;

    __device__ __forceinline__ const int* tiles(int tile_rows) const { return offsets + (tile_rows == 64 ? 1 : 2) * (groups + 2); }
};

/// The last place in [0, count) whose value is at most `wanted`; the values rise, and the first is at most `wanted`.
__device__ __forceinline__ int last_at_most(const int* values, int count, int wanted) {
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (values[middle] <= wanted) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/// A tile of rows of one group.
struct RowTile {
    int group, begin, rows;  // no rows: there is no such tile
};

template <int ROWS>
__device__ __forceinline__ RowTile find_tile(const Groups& groups, int number) {
    const int* tiles = groups.tiles(ROWS);
    if (number >= tiles[groups.groups + 1]) return RowTile{0, 0, 0};
    int group = last_at_most(tiles, groups.groups + 1, number);
    int begin = groups.offsets[group] + (number - tiles[group]) * ROWS, left = groups.offsets[group + 1] - begin;
    return RowTile{group, begin, left < ROWS ? left : ROWS};
}

/// The row of a flat choice; -1 where no row has such a choice.
__device__ __forceinline__ int64_t row_of_choice(int64_t choice, int per_row, int64_t rows) {
    return choice >= 0 && choice < rows * per_row ? choice / per_row : -1;
}

/// At most as many tiles as rows and groups can make.
inline unsigned tiles_at_most(int64_t rows, int groups, int tile_rows) {
    return static_cast<unsigned>((rows + tile_rows - 1) / tile_rows + groups);
}

constexpr int SCAN_THREADS = 256;

/// The sum over the threads before this one; `total` is the sum over all. `memory` has 8 numbers; the threads may go on to use it afterwards.
__device__ __forceinline__ int64_t sum_before(int64_t value, int64_t* memory, int64_t& total) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t sum = value;
    for (unsigned step = 1; step < 32; step *= 2) {
        int64_t other = shuffle_up(sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) memory[warp] = sum;
    __syncthreads();
    int64_t before = 0;
    total = 0;
    for (unsigned i = 0; i < SCAN_THREADS / 32; ++i) {
        if (i < warp) before += memory[i];
        total += memory[i];
    }
    __syncthreads();
    return before + sum - value;
}
