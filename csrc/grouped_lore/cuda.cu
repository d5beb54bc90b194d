// The hidden layer of the experts: the products with LoREs in them, and what stands between the products of the backward. The products without
// LoREs are those of csrc/grouped_gemm. megatron/kernels/grouped_lore/cuda.py says which follows which.
#include "../grouped_gemm/rows.cuh"
#include "../include/cuda_exports.cuh"
#include "elementwise.cuh"

namespace {
template <class T>
int lore_rows_of(const RowProduct& p, bool outer, cudaStream_t stream) {
    bool large = p.width > 64 && p.places / (p.groups > 0 ? p.groups : 1) >= 96;
    return outer ? start_rows<T, true, true>(p, large, stream) : start_rows<T, false, true>(p, large, stream);
}

dim3 flat_grid(int64_t count, int each) { return dim3(static_cast<unsigned>((count + each - 1) / each)); }
}  // namespace

/// As neox_multiply_rows, with LoREs.
EXPORTED int neox_multiply_lore_rows(const RowProduct* p, int half, int outer, cudaStream_t stream) {
    if (p->places == 0 || p->width == 0) return 0;
    return half ? lore_rows_of<Float16>(*p, outer != 0, stream) : lore_rows_of<BFloat16>(*p, outer != 0, stream);
}

EXPORTED int neox_activation_backward(const ActivationBackward* p, int half, cudaStream_t stream) {
    if (p->count == 0) return 0;
    auto kernel = half ? activation_backward<Float16> : activation_backward<BFloat16>;
    return launch("activation_backward", kernel, flat_grid(p->count, FLAT_THREADS * 8), dim3(FLAT_THREADS), 0, stream, *p);
}

EXPORTED int neox_lore_gradients(const LoreGradients* p, int half, cudaStream_t stream) {
    if (p->places == 0) return 0;
    auto kernel = half ? lore_gradients<Float16> : lore_gradients<BFloat16>;
    return launch("lore_gradients", kernel, flat_grid(p->places, FLAT_THREADS / 32), dim3(FLAT_THREADS), 0, stream, *p);
}

EXPORTED int neox_column_sums(const ColumnSums* p, int half, cudaStream_t stream) {
    if (p->groups == 0 || p->width == 0) return 0;
    auto kernel = half ? column_sums<Float16> : column_sums<BFloat16>;
    dim3 grid(static_cast<unsigned>((p->width + 31) / 32), static_cast<unsigned>(p->groups));
    return launch("column_sums", kernel, grid, dim3(FLAT_THREADS), sizeof(float) * FLAT_THREADS, stream, *p);
}
