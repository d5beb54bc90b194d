#include "runtime.hpp"

#include <cstdlib>
#include <cstring>

// The static shared memory of all kernels. The section may be empty.
extern char __start_emulated_shared[] __attribute__((weak));
extern char __stop_emulated_shared[] __attribute__((weak));

namespace emulation {

namespace {
constexpr size_t SHARED_LIMIT = 227 * 1024;  // of a block, on sm_90
constexpr unsigned char UNWRITTEN = 0xff;    // a NaN in every format
Fiber scheduler;
uint32_t epochs = 0;
std::vector<std::string> reports;
size_t reports_beyond = 0;
alignas(128) char dynamic_shared[SHARED_LIMIT];

void run_thread() {
    launch_now.body(const_cast<char*>(launch_now.context));
    Thread& thread = *launch_now.current;
    thread.finished = true;
    ++launch_now.finished;
    for (auto& group : thread.groups)
        for (auto& copy : group)
            for (auto& shadow : shared_shadows)
                if (shadow.contains(copy.to)) shadow.set_arriving(copy.to, 16, false);
    thread.groups.clear();
    launch_now.current = nullptr;
    thread.fiber.switch_to(scheduler);
    std::abort();  // a finished thread is never gone on with
}

bool runnable(const Thread& thread) { return !thread.finished && !thread.at_block_barrier && !thread.at_warp_operation; }

/// The next thread that can go on: of the same warp where there is one.
Thread* next_thread(int from) {
    int count = launch_now.threads;
    for (int step = 1; step <= count; ++step) {
        int number = launch_now.backwards ? from + count - step : from + step;
        Thread& thread = threads[static_cast<size_t>(number % count)];
        if (runnable(thread)) return &thread;
    }
    return nullptr;
}

void yield() {
    Thread& self = *launch_now.current;
    Thread* next = next_thread(self.index);
    if (next == &self) return;
    launch_now.current = next;
    if (next == nullptr) {
        self.fiber.switch_to(scheduler);
    } else {
        self.fiber.switch_to(next->fiber);
    }
}

std::string where_all_stand() {
    std::string text;
    for (int i = 0; i < launch_now.threads; ++i) {
        const Thread& thread = threads[static_cast<size_t>(i)];
        const char* what = thread.finished ? "has ended" : thread.at_block_barrier ? "waits at a barrier" : "waits for its warp";
        if (i == 0 || i == launch_now.threads - 1) text += (text.empty() ? "" : ", ") + ("thread " + std::to_string(i) + " ") + what;
    }
    return text;
}

void start_block() {
    auto& l = launch_now;
    l.finished = l.at_barrier = 0;
    l.epoch = l.block_epoch = ++epochs;
    l.warps.assign(static_cast<size_t>(l.threads + 31) / 32, Warp());
    std::memset(dynamic_shared, UNWRITTEN, l.shared_bytes);
    if (__start_emulated_shared != nullptr) std::memset(__start_emulated_shared, UNWRITTEN, static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
    for (auto& shadow : shared_shadows) shadow.forget();
    for (int i = 0; i < l.threads; ++i) {
        Thread& thread = threads[static_cast<size_t>(i)];
        thread.index = i;
        thread.finished = thread.at_block_barrier = thread.at_warp_operation = false;
        thread.groups.clear();
        thread.fiber.start(run_thread);
    }
}

void run_block() {
    auto& l = launch_now;
    start_block();
    while (l.finished < l.threads && !l.given_up) {
        l.current = next_thread(l.backwards ? 0 : l.threads - 1);
        if (l.current == nullptr) {
            report("deadlock: not every thread comes to the same barrier or warp operation (" + where_all_stand() + ")");
            l.given_up = true;
        } else {
            scheduler.switch_to(l.current->fiber);
        }
    }
    l.current = nullptr;
}
}  // namespace

Launch launch_now;
std::vector<Thread> threads;
std::vector<Shadow> shared_shadows;
std::vector<Shadow> global_shadows;

void report(const std::string& what) {
    if (reports.size() < 20) {
        auto& b = launch_now.block_index;
        auto block = std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z);
        reports.push_back(std::string(launch_now.kernel ? launch_now.kernel : "?") + "[" + block + "]: " + what);
    } else {
        ++reports_beyond;
    }
}

void give_up(const std::string& what) {
    report(what);
    launch_now.given_up = true;
    Thread& self = *launch_now.current;
    launch_now.current = nullptr;
    self.fiber.switch_to(scheduler);
    std::abort();
}

int run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context, size_t bytes) {
    auto& l = launch_now;
    size_t reported = reports.size() + reports_beyond;
    l.kernel = kernel;
    l.block_index = dim3(0, 0, 0);
    size_t count = static_cast<size_t>(block.x) * block.y * block.z;
    bool grid_fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535;
    if (!grid_fits || count == 0 || count > 1024 || shared_bytes > SHARED_LIMIT) {
        report("a device refuses this launch: grid " + std::to_string(grid.x) + "x" + std::to_string(grid.y) + "x" + std::to_string(grid.z) + ", " +
               std::to_string(count) + " threads, " + std::to_string(shared_bytes) + " bytes of shared memory");
        return 1;
    }
    l.grid = grid;
    l.block = block;
    l.shared_bytes = shared_bytes;
    l.body = body;
    l.context = static_cast<const char*>(context);
    l.context_bytes = bytes;
    l.threads = static_cast<int>(count);
    l.given_up = false;
    l.first_epoch = epochs + 1;
    if (threads.size() < count) threads.resize(count);
    shared_shadows.clear();
    shared_shadows.emplace_back(dynamic_shared, shared_bytes, "shared memory", true);
    if (__start_emulated_shared != nullptr)
        shared_shadows.emplace_back(__start_emulated_shared, static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared), "static shared memory", true);
    l.block_number = 0;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x && !l.given_up; ++x, ++l.block_number) {
                l.block_index = l.backwards ? dim3(grid.x - 1 - x, grid.y - 1 - y, grid.z - 1 - z) : dim3(x, y, z);
                run_block();
            }
    return reports.size() + reports_beyond == reported ? 0 : 1;
}

dim3 thread_index() {
    auto& l = launch_now;
    auto i = static_cast<unsigned>(l.current->index);
    return dim3(i % l.block.x, i / l.block.x % l.block.y, i / l.block.x / l.block.y);
}
dim3 block_index() { return launch_now.block_index; }
dim3 block_dimensions() { return launch_now.block; }
dim3 grid_dimensions() { return launch_now.grid; }
void* dynamic_shared_memory() { return dynamic_shared; }
unsigned lane() { return static_cast<unsigned>(launch_now.current->index) % 32; }

Moment now() {
    auto& l = launch_now;
    auto thread = static_cast<uint16_t>(l.current->index);
    return Moment{l.epoch, l.warps[thread / 32u].epoch, l.block_number, thread, false};
}

void block_barrier() {
    auto& l = launch_now;
    if (++l.at_barrier < l.threads) {
        l.current->at_block_barrier = true;
        yield();
        return;
    }
    for (int i = 0; i < l.threads; ++i) threads[static_cast<size_t>(i)].at_block_barrier = false;
    l.at_barrier = 0;
    l.epoch = ++epochs;
}

void warp_operation(const char* name, const void* in, void* out, WarpOperation operation) {
    auto& l = launch_now;
    Thread& self = *l.current;
    auto number = static_cast<size_t>(self.index) / 32;
    Warp& warp = l.warps[number];
    if (warp.arrived > 0 && std::strcmp(warp.operation, name) != 0)
        give_up("lanes of a warp are at different operations: " + std::string(warp.operation) + " and " + name);
    warp.operation = name;
    self.in = in;
    self.out = out;
    if (static_cast<int>(number * 32 + 32) > l.threads) give_up("warp operation in a block whose last warp is not full");
    if (++warp.arrived < 32) {
        self.at_warp_operation = true;
        yield();
        return;
    }
    Thread* lanes = &threads[number * 32];
    operation(lanes);
    warp.arrived = 0;
    for (int i = 0; i < 32; ++i) lanes[i].at_warp_operation = false;
}

void warp_barrier() {
    warp_operation("__syncwarp", nullptr, nullptr, [](Thread* lanes) { ++launch_now.warps[static_cast<size_t>(lanes->index) / 32].epoch; });
}

extern "C" {
/// Memory that kernels may touch from now on.
__attribute__((visibility("default"))) void emulation_register(const void* begin, size_t bytes, const char* name) {
    if (bytes > 0) global_shadows.emplace_back(static_cast<const char*>(begin), bytes, name, false);
}
/// Forgets all memory and all reports.
__attribute__((visibility("default"))) void emulation_clear() {
    global_shadows.clear();
    reports.clear();
    reports_beyond = 0;
}
/// A device promises no order of blocks and threads. 1: from now on they run from the last to the first.
__attribute__((visibility("default"))) void emulation_run_backwards(int backwards) { launch_now.backwards = backwards != 0; }
/// Everything found since the last clear, a line each.
__attribute__((visibility("default"))) const char* emulation_reports() {
    static std::string text;
    text.clear();
    for (auto& line : reports) text += line + "\n";
    if (reports_beyond > 0) text += "and " + std::to_string(reports_beyond) + " more\n";
    return text.c_str();
}
}

}  // namespace emulation
