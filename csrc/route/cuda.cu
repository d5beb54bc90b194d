// Routing on the device: two levels of softmax and top-k in one kernel, and a stable counting sort of the choices. Nothing waits for the host.
#include <cmath>

#include "../grouped_gemm/groups.cuh"
#include "../include/cuda_exports.cuh"

struct Route {
    const float* expert_logits;  // [tokens, experts]
    const float* lore_logits;    // [tokens, experts * lores], or no pointer: experts have no LoREs
    int64_t tokens;
    int experts, top_experts, lores, top_lores;
    int normalize_experts, normalize_lores;  // 1: the chosen weights sum to 1
    int64_t* expert;      // [tokens, top_experts]
    float* expert_weight;  // [tokens, top_experts]
    int64_t* key;          // [tokens, top_experts, top_lores]: expert * lores + lore
    float* pi;             // [tokens, top_experts, top_lores]
    float* log_sum;        // [tokens]: the logarithm of the sum of the exponentials of the expert logits
    float* probability;    // [tokens, experts], or no pointer
};

namespace {
constexpr int ROUTE_THREADS = 128;
constexpr int SORT_CHUNK = 1024;  // keys of one warp

/// A logit and where it stands. The larger one comes first; of equal ones the earlier. A NaN is the smallest.
struct Ranked {
    float value;
    int index;
};

__device__ __forceinline__ float rankable(float logit) { return logit == logit ? logit : -INFINITY; }

__device__ __forceinline__ bool before(const Ranked& a, const Ranked& b) { return a.value > b.value || (a.value == b.value && a.index < b.index); }

/// The first of `count` logits behind `last` in the order, found by all lanes of a warp.
__device__ __forceinline__ Ranked next_ranked(const float* logits, int count, const Ranked& last) {
    Ranked best{-INFINITY, count};
    for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
        Ranked here{rankable(logits[i]), i};
        if (before(last, here) && before(here, best)) best = here;
    }
    for (unsigned step = 16; step > 0; step /= 2) {
        Ranked other{shuffle_xor(best.value, step), shuffle_xor(best.index, step)};
        if (before(other, best)) best = other;
    }
    return best;
}

/// max + log(sum of exp(logit - max)), the same in all lanes; NaN where a logit is.
__device__ __forceinline__ float log_sum_of(const float* logits, int count) {
    float largest = next_ranked(logits, count, Ranked{INFINITY, -1}).value, sum = 0.0f;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) sum += expf(logits[i] - largest);
    for (unsigned step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
    return largest + logf(sum);
}

/// Sum of the softmax over the first `top` in the order; 1 where nothing is to be normalised.
__device__ __forceinline__ float sum_of_top(const float* logits, int count, int top, float log_sum, int normalize) {
    if (!normalize) return 1.0f;
    Ranked last{INFINITY, -1};
    float sum = 0.0f;
    for (int i = 0; i < top; ++i) {
        last = next_ranked(logits, count, last);
        sum += expf(logits[last.index] - log_sum);
    }
    return sum;
}

/// The LoREs of one chosen expert. `choice` is the flat number of (token, choice of an expert).
__device__ __forceinline__ void choose_lores(const Route& p, const float* logits, int64_t choice, int expert) {
    float log_sum = log_sum_of(logits, p.lores), all = sum_of_top(logits, p.lores, p.top_lores, log_sum, p.normalize_lores);
    Ranked last{INFINITY, -1};
    for (int i = 0; i < p.top_lores; ++i) {
        last = next_ranked(logits, p.lores, last);
        if (threadIdx.x % 32 != 0) continue;
        p.key[choice * p.top_lores + i] = static_cast<int64_t>(expert) * p.lores + last.index;
        p.pi[choice * p.top_lores + i] = expf(logits[last.index] - log_sum) / all;
    }
}

/// A warp routes one token.
__global__ void __launch_bounds__(ROUTE_THREADS) route(Route p) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * (ROUTE_THREADS / 32) + threadIdx.x / 32;
    if (token >= p.tokens) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float* logits = p.expert_logits + token * p.experts;
    const float log_sum = log_sum_of(logits, p.experts), all = sum_of_top(logits, p.experts, p.top_experts, log_sum, p.normalize_experts);
    if (lane == 0) p.log_sum[token] = log_sum;
    if (p.probability != nullptr)
        for (int i = lane; i < p.experts; i += 32) p.probability[token * p.experts + i] = expf(logits[i] - log_sum);
    Ranked last{INFINITY, -1};
    for (int i = 0; i < p.top_experts; ++i) {
        last = next_ranked(logits, p.experts, last);
        const int64_t choice = token * p.top_experts + i;
        if (lane == 0) {
            p.expert[choice] = last.index;
            p.expert_weight[choice] = expf(logits[last.index] - log_sum) / all;
        }
        if (p.lore_logits != nullptr) choose_lores(p, p.lore_logits + (token * p.experts + last.index) * p.lores, choice, last.index);
    }
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
}  // namespace

EXPORTED int neox_route(const Route* p, cudaStream_t stream) {
    if (p->tokens == 0) return 0;
    auto blocks = static_cast<unsigned>((p->tokens + ROUTE_THREADS / 32 - 1) / (ROUTE_THREADS / 32));
    return launch("route", route, dim3(blocks), dim3(ROUTE_THREADS), 0, stream, *p);
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
