// The state of the launch that is running: one block at a time, its threads as fibers.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "cuda_emulation.hpp"
#include "detector.hpp"
#include "fibers.hpp"

namespace emulation {

struct PendingCopy {
    char* to;
    int bytes;
    char data[16];
};

struct Thread {
    Fiber fiber;
    int index = 0;
    bool finished = false;
    bool at_block_barrier = false;
    bool at_warp_operation = false;
    const void* in = nullptr;  // what the lane brings to the operation of its warp
    void* out = nullptr;
    std::deque<std::vector<PendingCopy>> groups;  // asynchronous copies, the last group still open
};

/// What the lanes of a warp do together, once all have come.
using WarpOperation = void (*)(Thread* lanes);

struct Warp {
    int arrived = 0;
    uint32_t epoch = 1;
    const char* operation = nullptr;
};

struct Launch {
    const char* kernel = nullptr;
    dim3 grid, block;
    void (*body)(void*) = nullptr;
    const char* context = nullptr;
    size_t context_bytes = 0, shared_bytes = 0;
    int threads = 0, finished = 0, at_barrier = 0;
    dim3 block_index;
    uint32_t block_number = 0, epoch = 0, first_epoch = 0, block_epoch = 0;
    Thread* current = nullptr;  // nullptr: no kernel code is running
    bool given_up = false;
    bool backwards = false;  // blocks and threads run from the last to the first
    std::vector<Warp> warps;
};

extern Launch launch_now;
extern std::vector<Thread> threads;
extern std::vector<Shadow> shared_shadows;  // dynamic, then static shared memory
extern std::vector<Shadow> global_shadows;

/// Notes a fault. The first 20 are kept.
void report(const std::string& what);
/// Notes a fault after which the block cannot go on, and leaves the launch.
[[noreturn]] void give_up(const std::string& what);
/// A kernel touches memory: called before it does.
void access(const void* address, size_t bytes, Kind kind, bool atomic);
Moment now();
void warp_operation(const char* name, const void* in, void* out, WarpOperation operation);

}  // namespace emulation
