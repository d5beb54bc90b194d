// Small kernels for tests/csrc/test_emulation.py: each fault stands beside the same kernel without it.
#include "cuda_exports.cuh"
#include "cuda_numbers.cuh"
#include "cuda_warp.cuh"

namespace {
constexpr int THREADS = 64;

/// Every thread passes its number to the next one through shared memory.
__global__ void pass_on(int* out, int barrier) {
    __shared__ int numbers[THREADS];
    numbers[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
    if (barrier == 1) __syncthreads();
    if (barrier == 2) __syncwarp();  // orders the lanes of a warp only
    out[threadIdx.x] = numbers[(threadIdx.x + 1) % THREADS];
}

/// As above within a warp, over dynamic memory, and back: written, read, written.
__global__ void pass_within_warp(int* out, int barriers) {
    int* numbers = reinterpret_cast<int*>(dynamic_shared());
    const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
    numbers[threadIdx.x] = static_cast<int>(lane);
    __syncwarp();
    int next = numbers[first + (lane + 1) % 32];
    if (barriers > 1) __syncwarp();
    numbers[threadIdx.x] = next;
    out[threadIdx.x] = next;
}

/// Copies 16 bytes for each thread by way of shared memory.
__global__ void copy_through(const uint4* in, uint4* out, int wait) {
    auto* memory = reinterpret_cast<uint4*>(dynamic_shared());
    copy_async(memory + threadIdx.x, in + threadIdx.x, 16);
    commit_async();
    if (wait == 0) wait_async<1>();  // one group may be on its way: this one
    if (wait == 1) wait_async<0>();
    out[threadIdx.x] = memory[threadIdx.x];
}

__global__ void read_at(const float* in, float* out, int at) { out[threadIdx.x] = in[at]; }

__global__ void write_shared_at(int at) { reinterpret_cast<int*>(dynamic_shared())[at] = 1; }

__global__ void read_wide(const uint16_t* in, uint16_t* out, int at) {
    uint4 words = load_whole<uint4>(in + at);
    if (threadIdx.x == 0) out[0] = static_cast<uint16_t>(words.x);
}

__global__ void some_threads_wait(int threads) {
    if (static_cast<int>(threadIdx.x) < threads) __syncthreads();
}

__global__ void some_lanes_shuffle(int lanes) {
    if (static_cast<int>(threadIdx.x) % 32 < lanes) {
        shuffle_xor(1, 1);
    } else {
        __syncwarp();
    }
}

__global__ void blocks_add(int* out, int atomically) {
    if (threadIdx.x != 0) return;
    if (atomically) {
        atomicAdd(out, 1);
    } else {
        out[0] += 1;
    }
}

/// What the blocks add depends on their order: floats are rounded.
__global__ void blocks_add_floats(const float* in, float* out) {
    if (threadIdx.x == 0) atomicAdd(out, in[blockIdx.x]);
}

__global__ void lane_results(int* out) {
    int lane = static_cast<int>(threadIdx.x);
    out[lane] = shuffle_xor(lane, 5);
    out[32 + lane] = shuffle_up(lane, 3);
    out[64 + lane] = shuffle_from(lane, 7);
    out[96 + lane] = static_cast<int>(lanes_where(lane % 3 == 0));
    out[128 + lane] = static_cast<int>(lanes_with(lane % 4));
}

/// d[16, 8] = a[16, 16] b[16, 8]; `a` and `b` are read as the PTX manual lays fragments out, not by ldmatrix.
template <class T>
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* d) {
    const int group = static_cast<int>(threadIdx.x) / 4, inner = static_cast<int>(threadIdx.x) % 4 * 2;
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) {
        const uint16_t* from = a + (group + i % 2 * 8) * 16 + inner + i / 2 * 8;
        fa[i] = from[0] | static_cast<uint32_t>(from[1]) << 16;
    }
    for (int i = 0; i < 2; ++i) fb[i] = b[(inner + i * 8) * 8 + group] | static_cast<uint32_t>(b[(inner + i * 8 + 1) * 8 + group]) << 16;
    float sums[4] = {0, 0, 0, 0};
    multiply_accumulate(T{}, sums, fa, fb);
    for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + inner + i % 2] = sums[i];
}

/// Loads COUNT matrices [8, 8] that lie one after the other and writes what each lane got.
template <int COUNT, bool TRANSPOSED>
__global__ void load(const uint4* in, uint32_t* out) {
    auto* memory = reinterpret_cast<uint4*>(dynamic_shared());
    memory[threadIdx.x] = in[threadIdx.x];
    __syncwarp();
    uint32_t registers[COUNT];
    load_matrices<TRANSPOSED>(registers, memory + threadIdx.x % (8 * COUNT));
    for (int i = 0; i < COUNT; ++i) out[static_cast<int>(threadIdx.x) * COUNT + i] = registers[i];
}

template <bool TRANSPOSED>
int load_of(int count, const uint4* in, uint32_t* out) {
    auto kernel = count == 1 ? load<1, TRANSPOSED> : count == 2 ? load<2, TRANSPOSED> : load<4, TRANSPOSED>;
    return launch("load", kernel, dim3(1), dim3(32), 512, nullptr, in, out);
}
}  // namespace

EXPORTED int planted_pass_on(int* out, int barrier) { return launch("pass_on", pass_on, dim3(1), dim3(THREADS), 0, nullptr, out, barrier); }
EXPORTED int planted_pass_within_warp(int* out, int barriers) {
    return launch("pass_within_warp", pass_within_warp, dim3(1), dim3(THREADS), THREADS * 4, nullptr, out, barriers);
}
EXPORTED int planted_copy_through(const uint4* in, uint4* out, int wait) {
    return launch("copy_through", copy_through, dim3(1), dim3(THREADS), THREADS * 16, nullptr, in, out, wait);
}
EXPORTED int planted_read_at(const float* in, float* out, int at) { return launch("read_at", read_at, dim3(1), dim3(1), 0, nullptr, in, out, at); }
EXPORTED int planted_write_shared_at(int at) { return launch("write_shared_at", write_shared_at, dim3(1), dim3(1), 64, nullptr, at); }
EXPORTED int planted_read_wide(const uint16_t* in, uint16_t* out, int at) { return launch("read_wide", read_wide, dim3(1), dim3(1), 0, nullptr, in, out, at); }
EXPORTED int planted_some_threads_wait(int threads) { return launch("some_threads_wait", some_threads_wait, dim3(1), dim3(THREADS), 0, nullptr, threads); }
EXPORTED int planted_some_lanes_shuffle(int lanes) { return launch("some_lanes_shuffle", some_lanes_shuffle, dim3(1), dim3(32), 0, nullptr, lanes); }
EXPORTED int planted_blocks_add(int* out, int atomically) { return launch("blocks_add", blocks_add, dim3(3), dim3(32), 0, nullptr, out, atomically); }
EXPORTED int planted_blocks_add_floats(const float* in, float* out) {
    return launch("blocks_add_floats", blocks_add_floats, dim3(3), dim3(32), 0, nullptr, in, out);
}
EXPORTED int planted_too_much_shared(int bytes) {
    return launch("write_shared_at", write_shared_at, dim3(1), dim3(1), static_cast<size_t>(bytes), nullptr, 0);
}
EXPORTED int planted_lane_results(int* out) { return launch("lane_results", lane_results, dim3(1), dim3(32), 0, nullptr, out); }
EXPORTED int planted_multiply(const uint16_t* a, const uint16_t* b, float* d, int half) {
    return launch("multiply", half ? multiply<Float16> : multiply<BFloat16>, dim3(1), dim3(32), 0, nullptr, a, b, d);
}
EXPORTED int planted_load(const uint4* in, uint32_t* out, int count, int transposed) {
    return transposed ? load_of<true>(count, in, out) : load_of<false>(count, in, out);
}

/// On the host: the emulation's own conversions.
EXPORTED void planted_widen(const uint16_t* in, float* out, int count, int half) {
    for (int i = 0; i < count; ++i) out[i] = half ? to_float(Float16{in[i]}) : to_float(BFloat16{in[i]});
}
EXPORTED void planted_round(const float* in, uint16_t* out, int count, int half) {
    for (int i = 0; i < count; ++i) out[i] = half ? from_float<Float16>(in[i]).bits : from_float<BFloat16>(in[i]).bits;
}
