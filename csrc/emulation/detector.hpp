// Who touched which cell of memory last, and whether that was in order. A cell has two bytes: the smallest number that the kernels store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

/// Where a thread stands. Epochs count barriers over all blocks and launches, so equal epochs mean: the same block, no barrier between.
struct Moment {
    uint32_t epoch = 0;  // 0: nobody yet
    uint32_t warp_epoch = 0;
    uint32_t block = 0;
    uint16_t thread = 0;
    bool atomic = false;
};

struct Cell {
    Moment written, read, read_too;  // two readers of one block, in different warps where there are such
    Moment read_elsewhere;           // a reader of an earlier block
    bool arriving = false;           // an asynchronous copy into it was issued and not yet waited for
};

enum class Kind { read, write };

/// The cells of one range of memory.
class Shadow {
public:
    Shadow(const char* begin, size_t bytes, std::string name, bool shared) : name(std::move(name)), begin(begin), bytes(bytes), shared(shared) {}

    bool contains(const void* address) const {
        auto* place = static_cast<const char*>(address);
        return place >= begin && place < begin + bytes;
    }
    bool contains(const void* address, size_t size) const { return contains(address) && static_cast<const char*>(address) + size <= begin + bytes; }

    /// Notes the access. Returns what is wrong with it; empty: nothing. `first_epoch`: of the launch, for global memory; of the block, for shared.
    std::string touch(const void* address, size_t size, Kind kind, const Moment& now, uint32_t first_epoch);
    void set_arriving(const void* address, size_t size, bool arriving);
    void forget();

    std::string name;
    const char* begin;
    size_t bytes;
    bool shared;

private:
    std::vector<Cell> cells;  // made when the first access comes
    Cell& cell(const char* place) { return cells[static_cast<size_t>(place - begin) / 2]; }
    void make_cells() {
        if (cells.empty()) cells.resize(bytes / 2 + 1);
    }
};

std::string describe(const Moment& moment);

}  // namespace emulation
