#include "detector.hpp"

#include <algorithm>

namespace emulation {

namespace {
/// Whether nothing orders `before` and `now`, which are of one launch.
bool unordered(const Moment& before, const Moment& now, uint32_t first_epoch) {
    if (before.epoch < first_epoch || (before.atomic && now.atomic)) return false;
    if (before.block != now.block) return true;
    if (before.epoch != now.epoch || before.thread == now.thread) return false;
    bool same_warp = before.thread / 32 == now.thread / 32;
    return !(same_warp && before.warp_epoch != now.warp_epoch);
}

void note_read(Cell& cell, const Moment& now) {
    if (cell.read.epoch != 0 && cell.read.block != now.block) cell.read_elsewhere = cell.read;
    if (cell.read.epoch != now.epoch || cell.read.thread == now.thread) {
        cell.read = now;
    } else if (cell.read.thread / 32 != now.thread / 32 || cell.read_too.epoch != now.epoch) {
        cell.read_too = now;
    } else {
        cell.read = now;
    }
}
}  // namespace

std::string describe(const Moment& moment) {
    return "thread " + std::to_string(moment.thread) + " of block " + std::to_string(moment.block);
}

std::string Shadow::touch(const void* address, size_t size, Kind kind, const Moment& now, uint32_t first_epoch) {
    make_cells();
    auto* place = static_cast<const char*>(address);
    std::string wrong;
    auto conflict = [&](const char* what, const Moment& before) {
        if (wrong.empty() && unordered(before, now, first_epoch))
            wrong = std::string("race: ") + describe(now) + (kind == Kind::write ? " writes " : " reads ") + name + " + " +
                    std::to_string(static_cast<const char*>(address) - begin) + ", which " + describe(before) + " " + what + " with no barrier between";
    };
    for (const char* p = place; p < place + size; p += 2) {
        Cell& at = cell(p);
        if (at.arriving && wrong.empty())
            wrong = "missing wait: " + describe(now) + (kind == Kind::write ? " writes " : " reads ") + name + " + " + std::to_string(p - begin) +
                    " before the asynchronous copy into it was waited for";
        conflict("writes", at.written);
        if (kind == Kind::write) {
            conflict("reads", at.read);
            conflict("reads", at.read_too);
            conflict("reads", at.read_elsewhere);
            at.written = now;
        } else {
            note_read(at, now);
        }
    }
    return wrong;
}

void Shadow::set_arriving(const void* address, size_t size, bool arriving) {
    make_cells();
    auto* place = static_cast<const char*>(address);
    for (const char* p = place; p < place + size; p += 2) cell(p).arriving = arriving;
}

void Shadow::forget() { std::fill(cells.begin(), cells.end(), Cell()); }

}  // namespace emulation
