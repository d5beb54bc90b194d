// Grouped matrix products: rows by groups, and the outer products of the weight gradients. Called from megatron/kernels/cuda_library.py.
#include "outer.cuh"
#include "rows.cuh"

#include "../include/cuda_exports.cuh"

__global__ void __launch_bounds__(SCAN_THREADS) write_group_offsets(const int64_t* counts, int groups, int64_t rows, int* out) {
    auto* memory = reinterpret_cast<int64_t*>(dynamic_shared());
    int* parts[3] = {out, out + groups + 2, out + 2 * (groups + 2)};
    const int64_t sizes[3] = {1, 64, 128};
    int64_t before[3] = {0, 0, 0}, used = 0;
    for (int first = 0; first <= groups; first += SCAN_THREADS) {
        const int group = first + static_cast<int>(threadIdx.x);
        int64_t count = group < groups ? counts[group] : group == groups ? rows : 0, total = 0;
        count = count < 0 ? 0 : count > rows ? rows : count;
        int64_t begin = used + sum_before(count, memory, total), end = begin + count;
        used += total;
        begin = begin < rows ? begin : rows;
        end = end < rows ? end : rows;
        for (int part = 0; part < 3; ++part) {
            int64_t here = before[part] + sum_before((end - begin + sizes[part] - 1) / sizes[part], memory, total);
            before[part] += total;
            if (group <= groups) parts[part][group] = static_cast<int>(here);
        }
    }
    if (threadIdx.x == 0)
        for (int part = 0; part < 3; ++part) parts[part][groups + 1] = static_cast<int>(before[part]);
}

namespace {
/// Whether the rows of a group fill large tiles on average, and the result is wide enough.
bool fills_large(int64_t rows, int groups, int width) { return width > 64 && rows / (groups > 0 ? groups : 1) >= 96; }

template <class T>
int rows_of(const RowProduct& p, bool outer, cudaStream_t stream) {
    bool large = fills_large(p.places, p.groups, p.width);
    return outer ? start_rows<T, true, false>(p, large, stream) : start_rows<T, false, false>(p, large, stream);
}

template <class T>
int outer_of(const OuterProduct& p, cudaStream_t stream) {
    bool large = p.left.columns > 64 && p.right.columns > 64;
    return large ? start_outer<Large, T>(p, stream) : start_outer<Small, T>(p, stream);
}
}  // namespace

EXPORTED int neox_group_offsets(const int64_t* counts, int groups, int64_t rows, int* out, cudaStream_t stream) {
    return launch("write_group_offsets", write_group_offsets, dim3(1), dim3(SCAN_THREADS), sizeof(int64_t) * 8, stream, counts, groups, rows, out);
}

/// `outer`: the weights are [in, out], else [out, in]. Without LoREs.
EXPORTED int neox_multiply_rows(const RowProduct* p, int half, int outer, cudaStream_t stream) {
    if (p->places == 0 || p->width == 0) return 0;
    return half ? rows_of<Float16>(*p, outer != 0, stream) : rows_of<BFloat16>(*p, outer != 0, stream);
}

EXPORTED int neox_multiply_outer(const OuterProduct* p, int half, cudaStream_t stream) {
    if (p->groups == 0 || p->left.columns == 0 || p->right.columns == 0) return 0;
    return half ? outer_of<Float16>(*p, stream) : outer_of<BFloat16>(*p, stream);
}

/// Of the sources that a library for a GPU was built from; 0 elsewhere.
#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST 0
#endif
EXPORTED uint64_t neox_source_digest() { return SOURCE_DIGEST; }

EXPORTED int neox_sizes(int which) { return static_cast<int>(which == 0 ? sizeof(RowProduct) : sizeof(OuterProduct)); }
