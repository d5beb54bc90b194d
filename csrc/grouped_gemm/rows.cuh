// Every group multiplies its own rows: out[p] = x[source of p] @ weight[group of p] + the LoREs' part, then bias, gate and activation.
#pragma once

#include "../include/cuda_epilogue.cuh"
#include "../include/cuda_tiles.cuh"
#include "groups.cuh"

/// LoREs as more steps of the same product: out[p] += sum over the LoREs g of row p of z[place of (p, g)] @ factor[g].
struct Lores {
    Matrix z;                // [places, rank]; no data: there are no LoREs
    Matrix factor;           // of one LoRE, [rank, width]
    int64_t factor_stride;   // numbers from LoRE to LoRE
    const int* offsets;      // of the LoREs in z, from `group_offsets`
    const int64_t* inverse;  // [rows, per_row]: the place of each choice. No pointer: the place is the row itself, or its place in `order`
    int lores;               // of each group
    int per_row;
};

struct RowProduct {
    Matrix x;
    int64_t rows;          // of x
    int64_t places;        // p runs over them; the groups have them
    const int64_t* order;  // x's row at place p is order[p] / order_divisor. No pointer: p itself
    int order_divisor;
    int scatter;  // 1: results go to x's row, 0: to place p
    const int* offsets;
    int groups;
    Matrix weight;          // of one group; no data: zeros
    int64_t weight_stride;  // numbers from group to group
    int width;              // columns of the result
    Lores lores;
    const uint16_t* bias;    // [groups, width], or no pointer
    const float* addend;     // [rows, width], or no pointer: added before anything is rounded
    float* sums;             // [rows, width], or no pointer: the sums unrounded; nothing else is written then
    uint16_t* product;       // [rows, width], or no pointer: the sums
    uint16_t* result;        // [rows, width], or no pointer: act(sum), act(gate) * sum, or scale * sum
    const uint16_t* gate;    // [rows, width], or no pointer
    const float* scale;      // of choice order[p], or no pointer
    int activation;
};

/// Shared memory of a tile beside the product's.
struct TileRows {
    int* source;      // [ROWS] x's row, -1: none
    int* place;       // [ROWS * per_row] the row of z of each choice
    int* key;         // [ROWS * per_row] the number of the choice's LoRE within the group; -1: none
    unsigned* used;   // bits: the keys that the tile has
};

/// Keys count the LoREs of a group. A row that chooses one LoRE several times has the key m + c * lores the (c+1)-th time, so keys of a row differ.
__device__ __host__ inline int key_words(const Lores& lores) { return (lores.lores * lores.per_row + 31) / 32; }

template <class C>
__host__ inline size_t tile_rows_bytes(const RowProduct& p) {
    size_t choices = p.lores.z.data == nullptr ? 0 : static_cast<size_t>(C::ROWS) * static_cast<size_t>(p.lores.per_row) * 2 + static_cast<size_t>(key_words(p.lores));
    return sizeof(int) * (C::ROWS + choices);
}

__device__ __forceinline__ int source_row(const RowProduct& p, int place) {
    return p.order == nullptr ? place : static_cast<int>(row_of_choice(p.order[place], p.order_divisor, p.rows));
}

/// The places and keys of row `i`, whose row of x is `source` and whose place is `place`.
__device__ __forceinline__ void find_choices(const RowProduct& p, const TileRows& tile, const RowTile& rows, int i, int place, int source) {
    const Lores& lores = p.lores;
    const int* offsets = lores.offsets + rows.group * lores.lores;
    for (int choice = 0; choice < lores.per_row; ++choice) {
        int at = i * lores.per_row + choice, key = -1;
        int64_t z_row = lores.inverse == nullptr ? place : source < 0 ? -1 : lores.inverse[static_cast<int64_t>(source) * lores.per_row + choice];
        if (source >= 0 && rows.group < p.groups && z_row >= offsets[0] && z_row < offsets[lores.lores]) {
            key = last_at_most(offsets, lores.lores, static_cast<int>(z_row));
            for (int before = 0; before < choice; ++before)
                if (tile.key[i * lores.per_row + before] >= 0 && tile.key[i * lores.per_row + before] % lores.lores == key % lores.lores) key += lores.lores;
            atomicOr(tile.used + key / 32, 1u << key % 32);
        }
        tile.place[at] = static_cast<int>(z_row);
        tile.key[at] = key;
    }
}

/// Fills `tile`. Ends with a barrier.
template <class C, bool LORES>
__device__ __forceinline__ void find_rows(const RowProduct& p, const TileRows& tile, const RowTile& rows) {
    if constexpr (LORES) {
        for (int word = static_cast<int>(threadIdx.x); word < key_words(p.lores); word += C::THREADS) tile.used[word] = 0;
        __syncthreads();
    }
    for (int i = static_cast<int>(threadIdx.x); i < C::ROWS; i += C::THREADS) {
        int source = i < rows.rows ? source_row(p, rows.begin + i) : -1;
        tile.source[i] = source;
        if constexpr (LORES) find_choices(p, tile, rows, i, rows.begin + i, source);
    }
    __syncthreads();
}

/// The first key from `key` on that the tile has; `words * 32` where there is none.
__device__ __forceinline__ int next_key(const unsigned* used, int words, int key) {
    for (int word = key / 32; word < words; ++word, key = word * 32) {
        unsigned bits = used[word] & (~0u << key % 32);
        if (bits != 0) return word * 32 + __ffs(static_cast<int>(bits)) - 1;
    }
    return words * 32;
}

/// Walks over the steps of a tile: first those of the weight, then for each LoRE that the tile has those over its rank.
struct Steps {
    int weight = 0, all = 0;  // how many
    int key = 0, rank = 0;    // of the next step of a LoRE that is loaded
};

template <bool LORES>
__device__ __forceinline__ Steps count_steps(const RowProduct& p, const TileRows& tile, const RowTile& rows) {
    Steps steps;
    bool there = rows.group < p.groups;
    steps.weight = steps.all = there && p.weight.data != nullptr ? (p.x.columns + DEPTH - 1) / DEPTH : 0;
    if constexpr (LORES) {
        const int words = key_words(p.lores);
        int keys = 0;
        for (int word = 0; word < words; ++word) keys += __popc(tile.used[word]);
        steps.all += keys * ((p.lores.z.columns + DEPTH - 1) / DEPTH);
        steps.key = next_key(tile.used, words, 0);
    }
    return steps;
}

/// A step of a LoRE: z of the rows that chose it, zeros for the others; and its factor.
template <class C>
__device__ __forceinline__ void load_lore_step(const RowProduct& p, const TileRows& tile, Steps& steps, int group, int column, uint16_t* a, uint16_t* b) {
    const Lores& lores = p.lores;
    const int key = steps.key;
    load_tile<C::ROWS, DEPTH, C::THREADS>(a, lores.z, steps.rank, [&](int i) -> int64_t {
        for (int at = i * lores.per_row; at < (i + 1) * lores.per_row; ++at)
            if (tile.key[at] == key) return tile.place[at];
        return -1;
    });
    Matrix factor = lores.factor;
    factor.data += (static_cast<int64_t>(group) * lores.lores + key % lores.lores) * lores.factor_stride;
    load_tile<DEPTH, C::COLUMNS, C::THREADS>(b, factor, column, RowsFrom{steps.rank, lores.z.columns});
    steps.rank += DEPTH;
    if (steps.rank >= lores.z.columns) {
        steps.rank = 0;
        steps.key = next_key(tile.used, key_words(lores), key + 1);
    }
}

/// The sums of a tile.
template <class C, class T, bool WEIGHT_OUTER, bool LORES>
__device__ __forceinline__ void sum_tile(const RowProduct& p, const TileRows& tile, const RowTile& rows, int column, uint16_t* tiles, Sums<C>& sums) {
    Steps steps = count_steps<LORES>(p, tile, rows);
    Matrix weight = p.weight;
    if (rows.group < p.groups) weight.data += rows.group * p.weight_stride;
    auto load = [&](int step, uint16_t* a, uint16_t* b) {
        if (LORES && step >= steps.weight) {
            load_lore_step<C>(p, tile, steps, rows.group, column, a, b);
            return;
        }
        load_tile<C::ROWS, DEPTH, C::THREADS>(a, p.x, step * DEPTH, [&](int i) -> int64_t { return tile.source[i]; });
        if constexpr (WEIGHT_OUTER) {
            load_tile<DEPTH, C::COLUMNS, C::THREADS>(b, weight, column, RowsFrom{step * DEPTH, p.x.columns});
        } else {
            load_tile<C::COLUMNS, DEPTH, C::THREADS>(b, weight, step * DEPTH, RowsFrom{column, p.width});
        }
    };
    auto multiply = [&](int step, const uint16_t* a, const uint16_t* b) {
        if (WEIGHT_OUTER || !LORES || step < steps.weight) {
            multiply_tiles<C, T, false, WEIGHT_OUTER>(sums, a, b);
        } else {
            multiply_tiles<C, T, false, true>(sums, a, b);
        }
    };
    sums.clear();
    run_pipeline<C>(tiles, steps.all, load, multiply);
}

/// Eight sums of one row become eight results.
template <class T>
__device__ __forceinline__ void finish_8(const RowProduct& p, float (&v)[8], const RowTile& rows, int place, int64_t row, int column) {
    const int there = p.width - column < 8 ? p.width - column : 8;
    const bool whole = there == 8 && p.width % 8 == 0;
    const int64_t at = row * p.width + column;
    if (p.bias != nullptr && rows.group < p.groups) {
        float bias[8];
        load_8<T>(bias, p.bias + static_cast<int64_t>(rows.group) * p.width + column, there, whole);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += bias[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (p.addend != nullptr && i < there) v[i] += p.addend[at + i];
        if (p.sums != nullptr && i < there) p.sums[at + i] = v[i];
    }
    if (p.product != nullptr) store_8<T>(p.product + at, v, there, whole);
    if (p.result == nullptr) return;
    float factor[8];
    if (p.gate != nullptr) load_8<T>(factor, p.gate + at, there, whole);
    const float scale = p.scale != nullptr ? p.scale[p.order == nullptr ? place : p.order[place]] : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (p.scale != nullptr) {
            v[i] *= scale;
        } else {
            float rounded = to_float(from_float<T>(v[i]));  // the backward sees the rounded one
            v[i] = p.gate != nullptr ? activate(p.activation, factor[i]) * rounded : activate(p.activation, rounded);
        }
    }
    store_8<T>(p.result + at, v, there, whole);
}

template <class C, class T, bool WEIGHT_OUTER, bool LORES>
__global__ void __launch_bounds__(C::THREADS) multiply_rows(RowProduct p) {
    unsigned char* memory = dynamic_shared();
    const Groups groups{p.offsets, p.groups};
    const RowTile rows = find_tile<C::ROWS>(groups, static_cast<int>(blockIdx.x));
    if (rows.rows == 0) return;
    const int column = static_cast<int>(blockIdx.y) * C::COLUMNS;
    TileRows tile;
    tile.source = reinterpret_cast<int*>(memory + PRODUCT_BYTES<C>);
    tile.place = tile.source + C::ROWS;
    tile.key = tile.place + C::ROWS * p.lores.per_row;
    tile.used = reinterpret_cast<unsigned*>(tile.key + C::ROWS * p.lores.per_row);
    find_rows<C, LORES>(p, tile, rows);
    Sums<C> sums;
    sum_tile<C, T, WEIGHT_OUTER, LORES>(p, tile, rows, column, reinterpret_cast<uint16_t*>(memory), sums);
    float* stage = reinterpret_cast<float*>(memory);
    Stage<C>::write(stage, sums);
    __syncthreads();
    constexpr int CHUNKS = C::COLUMNS / 8;
    for (int at = static_cast<int>(threadIdx.x); at < C::ROWS * CHUNKS; at += C::THREADS) {
        int i = at / CHUNKS, chunk = at % CHUNKS;
        if (tile.source[i] < 0 || column + chunk * 8 >= p.width) continue;
        const float* from = stage + i * Stage<C>::STRIDE + chunk * 8;
        float4 low = load_whole<float4>(from), high = load_whole<float4>(from + 4);
        float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        finish_8<T>(p, v, rows, rows.begin + i, p.scatter ? tile.source[i] : rows.begin + i, column + chunk * 8);
    }
}

/// Starts the kernel. Large tiles where the groups fill them.
template <class C, class T, bool WEIGHT_OUTER, bool LORES>
int start_rows(const RowProduct& p, cudaStream_t stream) {
    dim3 grid(tiles_at_most(p.places, p.groups, C::ROWS), static_cast<unsigned>((p.width + C::COLUMNS - 1) / C::COLUMNS));
    return launch("multiply_rows", multiply_rows<C, T, WEIGHT_OUTER, LORES>, grid, dim3(C::THREADS), PRODUCT_BYTES<C> + tile_rows_bytes<C>(p), stream, p);
}

template <class T, bool WEIGHT_OUTER, bool LORES>
int start_rows(const RowProduct& p, bool large, cudaStream_t stream) {
    return large ? start_rows<Large, T, WEIGHT_OUTER, LORES>(p, stream) : start_rows<Small, T, WEIGHT_OUTER, LORES>(p, stream);
}
