// Routing on the device: softmax and top-k of every row, its gradient, sums for the losses, and a stable counting sort. Nothing waits for the host.
// Called from megatron/kernels/route/cuda.py. All sums have a fixed order.
#include <cmath>

#include "../grouped_gemm/groups.cuh"
#include "../include/cuda_exports.cuh"
#include "../include/cuda_numbers.cuh"

/// Rows, their candidates and their parents.
struct Selected {
    int64_t rows;
    int candidates, top;
    int parents;
    const int* offsets;  // of the parents, as neox_group_offsets writes them
    float scale;
    int normalize;  // 1: the weights of a row sum to `scale`
};

struct Route {
    Selected of;
    const float* logit;  // [rows, candidates]
    float* weight;       // [rows, top]
    int64_t* choice;     // [rows, top]
    int64_t* key;        // [rows, top]: parent * candidates + choice
    float* probability;  // [rows, candidates]
    float* log_sum;      // [rows]: the logarithm of the sum of the exponentials
    float* entropy;      // [rows]
};

struct RouteBackward {
    Selected of;
    const float* grad_weight;       // [rows, top], or no pointer: no gradient, here and below
    const float* grad_probability;  // [rows, candidates]
    const float* grad_log_sum;      // [rows]
    const float* grad_total;        // [parents, candidates]
    const float* probability;
    const int64_t* choice;
    float* grad_logit;  // [rows, candidates]
};

struct RouteSums {
    Selected of;
    const float* probability;
    const float* entropy;
    float* partial;  // [tiles, candidates + 1], between the kernels
    float* total;    // [parents, candidates]
    float* mean;     // the mean of the entropies, 0 without rows
};

namespace {
constexpr int ROUTE_THREADS = 128, SUM_THREADS = 256, SUM_ROWS = 128;
constexpr int SORT_CHUNK = 1024;  // keys of one warp

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % 32; }

__device__ __forceinline__ float warp_sum(float value) {
    for (unsigned step = 16; step > 0; step /= 2) value += shuffle_xor(value, step);
    return value;
}

__device__ __forceinline__ uint32_t bits_of(float x) {
#ifdef __CUDACC__
    return __float_as_uint(x);
#else
    return same_bits<uint32_t>(x);
#endif
}

/// A whole number for a logit and its place. It rises with the logit; of equal logits the earlier has the larger one. NaN is above all.
__device__ __forceinline__ uint64_t rank_of(float logit, int place) {
    uint32_t bits = logit == 0.0f ? 0u : bits_of(logit);
    bits = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(0x7fffffff - place);
}

/// The largest rank below `last`, found by all lanes of a warp; 0: there is none.
__device__ __forceinline__ uint64_t next_rank(const float* logits, int count, uint64_t last) {
    uint64_t best = 0;
    for (int i = lane_of_thread(); i < count; i += 32) {
        const uint64_t here = rank_of(logits[i], i);
        if (here < last && here > best) best = here;
    }
    for (unsigned step = 16; step > 0; step /= 2) {
        const uint64_t other = shuffle_xor(best, step);
        if (other > best) best = other;
    }
    return best;
}

/// The largest logit that is a number; -infinity without one.
__device__ __forceinline__ float largest_of(const float* logits, int count) {
    float largest = -INFINITY;
    for (int i = lane_of_thread(); i < count; i += 32) largest = logits[i] > largest ? logits[i] : largest;
    for (unsigned step = 16; step > 0; step /= 2) {
        const float other = shuffle_xor(largest, step);
        largest = other > largest ? other : largest;
    }
    return largest;
}

/// The parent of a row; `parents` for a row that no parent has.
__device__ __forceinline__ int parent_of(const Selected& of, int64_t row) { return last_at_most(of.offsets, of.parents + 1, static_cast<int>(row)); }

/// Writes the choices of a row. A weight is the probability times `scale`, and over the sum of the chosen ones where that is asked for.
__device__ __forceinline__ void choose(const Route& p, const float* logits, int64_t row, float largest, float share) {
    const int64_t key = static_cast<int64_t>(parent_of(p.of, row)) * p.of.candidates, first = row * p.of.top;
    uint64_t last = ~0ull;
    float sum = 0.0f;
    for (int k = 0; k < p.of.top; ++k) {
        last = next_rank(logits, p.of.candidates, last);
        const int place = 0x7fffffff - static_cast<int>(last & 0x7fffffff);
        const float chosen = expf(logits[place] - largest) * share;
        sum += chosen;
        if (lane_of_thread() != 0) continue;
        p.choice[first + k] = place;
        p.key[first + k] = key + place;
        p.weight[first + k] = chosen * p.of.scale;
    }
    if (lane_of_thread() != 0 || !p.of.normalize) return;
    for (int k = 0; k < p.of.top; ++k) p.weight[first + k] /= sum;
}

/// A warp has one row.
__global__ void __launch_bounds__(ROUTE_THREADS) route(Route p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (ROUTE_THREADS / 32) + threadIdx.x / 32;
    if (row >= p.of.rows) return;
    const int count = p.of.candidates;
    const float* logits = p.logit + row * count;
    const float largest = largest_of(logits, count);
    float sum = 0.0f, spread = 0.0f;
    for (int i = lane_of_thread(); i < count; i += 32) {
        const float below = logits[i] - largest, part = expf(below);
        sum += part;
        if (part > 0.0f) spread += part * below;
    }
    sum = warp_sum(sum);
    spread = warp_sum(spread);
    const float share = 1.0f / sum;
    for (int i = lane_of_thread(); i < count; i += 32) p.probability[row * count + i] = expf(logits[i] - largest) * share;
    if (lane_of_thread() == 0) {
        p.log_sum[row] = largest + logf(sum);
        p.entropy[row] = logf(sum) - spread * share;
    }
    choose(p, logits, row, largest, share);
}

/// What the gradient of a weight becomes on its way to the probability: factor * gradient - shift.
struct WeightGradient {
    float factor, shift;
};

__device__ __forceinline__ WeightGradient weight_gradient(const RouteBackward& p, const float* probability, const int64_t* choice, const float* grad_weight) {
    if (grad_weight == nullptr || !p.of.normalize) return WeightGradient{p.of.scale, 0.0f};
    float total = 0.0f, inner = 0.0f;
    for (int k = lane_of_thread(); k < p.of.top; k += 32) {
        const float chosen = choice[k] >= 0 && choice[k] < p.of.candidates ? probability[choice[k]] : 0.0f;
        total += chosen;
        inner += chosen * grad_weight[k];
    }
    const float share = 1.0f / warp_sum(total), factor = p.of.scale * share;
    return WeightGradient{factor, factor * share * warp_sum(inner)};
}

/// The gradient of probability `i` from its weight; 0 where it was not chosen.
__device__ __forceinline__ float grad_of_chosen(const int64_t* choice, const float* grad_weight, int top, int i, const WeightGradient& through) {
    float grad = 0.0f;
    for (int k = 0; k < top; ++k)
        if (choice[k] == i) grad += through.factor * grad_weight[k] - through.shift;
    return grad;
}

__global__ void __launch_bounds__(ROUTE_THREADS) route_backward(RouteBackward p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (ROUTE_THREADS / 32) + threadIdx.x / 32;
    if (row >= p.of.rows) return;
    const int count = p.of.candidates, parent = p.grad_total == nullptr ? 0 : parent_of(p.of, row);
    const float* probability = p.probability + row * count;
    const float* grad_weight = p.grad_weight == nullptr ? nullptr : p.grad_weight + row * p.of.top;
    const float* grad_probability = p.grad_probability == nullptr ? nullptr : p.grad_probability + row * count;
    const float* grad_total = p.grad_total == nullptr || parent >= p.of.parents ? nullptr : p.grad_total + static_cast<int64_t>(parent) * count;
    const int64_t* choice = p.choice + row * p.of.top;
    float* out = p.grad_logit + row * count;
    const WeightGradient through = weight_gradient(p, probability, choice, grad_weight);
    float shift = 0.0f;
    for (int i = lane_of_thread(); i < count; i += 32) {
        float grad = grad_probability == nullptr ? 0.0f : grad_probability[i];
        if (grad_total != nullptr) grad += grad_total[i];
        if (grad_weight != nullptr) grad += grad_of_chosen(choice, grad_weight, p.of.top, i, through);
        out[i] = grad;
        shift += grad * probability[i];
    }
    shift = warp_sum(shift) - (p.grad_log_sum == nullptr ? 0.0f : p.grad_log_sum[row]);
    for (int i = lane_of_thread(); i < count; i += 32) out[i] = probability[i] * (out[i] - shift);
}

/// The sums of one tile of rows of one parent: a block has 32 columns, a warp every eighth row. The last column is the entropies.
__global__ void __launch_bounds__(SUM_THREADS) route_sum_tiles(RouteSums p) {
    auto* memory = reinterpret_cast<float*>(dynamic_shared());
    const RowTile tile = find_tile<SUM_ROWS>(Groups{p.of.offsets, p.of.parents}, static_cast<int>(blockIdx.x));
    if (tile.rows == 0) return;
    const int lane = lane_of_thread(), warp = static_cast<int>(threadIdx.x) / 32, column = static_cast<int>(blockIdx.y) * 32 + lane;
    const int64_t count = p.of.candidates;
    float sum = 0.0f;
    if (column <= count)
        for (int64_t row = tile.begin + warp; row < tile.begin + tile.rows; row += SUM_THREADS / 32)
            sum += column < count ? p.probability[row * count + column] : p.entropy[row];
    memory[threadIdx.x] = sum;
    __syncthreads();
    if (warp != 0 || column > count) return;
    for (int other = 1; other < SUM_THREADS / 32; ++other) sum += memory[other * 32 + lane];
    p.partial[blockIdx.x * (count + 1) + column] = sum;
}

/// A warp adds the tiles of one parent, 32 columns of them; the last one adds the entropies of all tiles.
__global__ void __launch_bounds__(32) route_sum_parents(RouteSums p) {
    const int parent = static_cast<int>(blockIdx.x), column = static_cast<int>(blockIdx.y) * 32 + lane_of_thread();
    const int* tiles = Groups{p.of.offsets, p.of.parents}.tiles(SUM_ROWS);
    const int64_t count = p.of.candidates;
    float sum = 0.0f;
    if (parent < p.of.parents) {
        if (column >= count) return;
        for (int64_t tile = tiles[parent]; tile < tiles[parent + 1]; ++tile) sum += p.partial[tile * (count + 1) + column];
        p.total[parent * count + column] = sum;
        return;
    }
    if (blockIdx.y != 0) return;
    for (int64_t tile = lane_of_thread(); tile < tiles[p.of.parents + 1]; tile += 32) sum += p.partial[tile * (count + 1) + count];
    sum = warp_sum(sum);
    if (lane_of_thread() == 0) p.mean[0] = p.of.rows > 0 ? sum / static_cast<float>(p.of.rows) : 0.0f;
}

struct CountingSort {
    const int64_t* keys;
    int64_t count;
    int groups;      // keys outside of [0, groups) stand behind all others
    int* before;     // [chunks, groups + 1], between the kernels
    int64_t* rows;   // [groups + 1]
    int* offsets;    // as neox_group_offsets writes them, of groups + 1
    int64_t* order;    // [count]
    int64_t* inverse;  // [count]
};

/// Goes over the keys of this warp's chunk in order. `place(i, key, rank)` is called for each, `rank` counting equal keys of the chunk.
template <class Place>
__device__ __forceinline__ void rank_chunk(const CountingSort& p, int* seen, Place place) {
    const int lane = static_cast<int>(threadIdx.x);
    for (int bin = lane; bin <= p.groups; bin += 32) seen[bin] = 0;
    __syncwarp();
    const int64_t first = static_cast<int64_t>(blockIdx.x) * SORT_CHUNK;
    for (int64_t start = first; start < first + SORT_CHUNK && start < p.count; start += 32) {
        const bool there = start + lane < p.count;
        const int64_t given = there ? p.keys[start + lane] : 0;
        const int key = !there ? -1 : given >= 0 && given < p.groups ? static_cast<int>(given) : p.groups;
        const unsigned equal = lanes_with(key);
        const int earlier = __popc(equal & ((1u << lane) - 1)), seen_before = there ? seen[key] : 0;
        __syncwarp();
        if (there && earlier == 0) seen[key] = seen_before + __popc(equal);
        __syncwarp();
        if (there) place(start + lane, key, seen_before + earlier);
    }
}

__global__ void __launch_bounds__(32) sort_count(CountingSort p) {
    int* seen = reinterpret_cast<int*>(dynamic_shared());
    rank_chunk(p, seen, [](int64_t, int, int) {});
    for (int bin = static_cast<int>(threadIdx.x); bin <= p.groups; bin += 32) p.before[static_cast<int64_t>(blockIdx.x) * (p.groups + 1) + bin] = seen[bin];
}

/// Turns the counts of the chunks into how many equal keys the chunks before have.
__global__ void __launch_bounds__(ROUTE_THREADS) sort_prefix(CountingSort p, int chunks) {
    const int64_t bins = p.groups + 1, bin = static_cast<int64_t>(blockIdx.x) * ROUTE_THREADS + threadIdx.x;
    if (bin >= bins) return;
    int sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        int here = p.before[chunk * bins + bin];
        p.before[chunk * bins + bin] = sum;
        sum += here;
    }
    p.rows[bin] = sum;
}

__global__ void __launch_bounds__(32) sort_place(CountingSort p) {
    int* seen = reinterpret_cast<int*>(dynamic_shared());
    const int* before = p.before + static_cast<int64_t>(blockIdx.x) * (p.groups + 1);
    rank_chunk(p, seen, [&](int64_t i, int key, int rank) {
        const int64_t at = static_cast<int64_t>(p.offsets[key]) + before[key] + rank;
        p.order[at] = i;
        p.inverse[i] = at;
    });
}
dim3 row_grid(int64_t rows) { return dim3(static_cast<unsigned>((rows + ROUTE_THREADS / 32 - 1) / (ROUTE_THREADS / 32))); }
}  // namespace

EXPORTED int neox_route(const Route* p, cudaStream_t stream) {
    if (p->of.rows == 0) return 0;
    return launch("route", route, row_grid(p->of.rows), dim3(ROUTE_THREADS), 0, stream, *p);
}

EXPORTED int neox_route_backward(const RouteBackward* p, cudaStream_t stream) {
    if (p->of.rows == 0) return 0;
    return launch("route_backward", route_backward, row_grid(p->of.rows), dim3(ROUTE_THREADS), 0, stream, *p);
}

/// How many tiles `partial` of the sums has.
EXPORTED int64_t neox_route_tiles(int64_t rows, int parents) { return tiles_at_most(rows, parents + 1, SUM_ROWS); }

EXPORTED int neox_route_sums(const RouteSums* p, cudaStream_t stream) {
    const auto columns = static_cast<unsigned>(p->of.candidates / 32 + 1), tiles = static_cast<unsigned>(neox_route_tiles(p->of.rows, p->of.parents));
    int status = launch("route_sum_tiles", route_sum_tiles, dim3(tiles, columns), dim3(SUM_THREADS), sizeof(float) * SUM_THREADS, stream, *p);
    if (status != 0) return status;
    return launch("route_sum_parents", route_sum_parents, dim3(static_cast<unsigned>(p->of.parents) + 1, columns), dim3(32), 0, stream, *p);
}

EXPORTED int neox_group_offsets(const int64_t* counts, int groups, int64_t rows, int* out, cudaStream_t stream);

/// How many chunks `before` of the counting sort has.
EXPORTED int64_t neox_sort_chunks(int64_t count) { return (count + SORT_CHUNK - 1) / SORT_CHUNK; }

EXPORTED int neox_counting_sort(const CountingSort* p, cudaStream_t stream) {
    const auto chunks = static_cast<unsigned>(neox_sort_chunks(p->count));
    const size_t bins = static_cast<size_t>(p->groups) + 1;
    int status = 0;
    if (chunks > 0) status = launch("sort_count", sort_count, dim3(chunks), dim3(32), bins * sizeof(int), stream, *p);
    const dim3 blocks(static_cast<unsigned>((bins + ROUTE_THREADS - 1) / ROUTE_THREADS));
    if (status == 0) status = launch("sort_prefix", sort_prefix, blocks, dim3(ROUTE_THREADS), 0, stream, *p, static_cast<int>(chunks));
    if (status == 0) status = neox_group_offsets(p->rows, static_cast<int>(bins), p->count, p->offsets, stream);
    if (status == 0 && chunks > 0) status = launch("sort_place", sort_place, dim3(chunks), dim3(32), bins * sizeof(int), stream, *p);
    return status;
}

EXPORTED int neox_route_sizes(int which) {
    const size_t sizes[] = {sizeof(Route), sizeof(RouteBackward), sizeof(RouteSums), sizeof(CountingSort)};
    return static_cast<int>(sizes[which]);
}
