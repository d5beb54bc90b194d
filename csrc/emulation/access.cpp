// Every load and store of a kernel comes through here first: the kernels are compiled with -fsanitize=thread, and the functions that the compiler
// calls then are these, not those of its own library.
#include <link.h>

#include "runtime.hpp"

namespace emulation {

namespace {
struct Image {
    uintptr_t begin = 0, end = 0;
};

/// This library in memory: its constants may be read.
Image find_image() {
    Image image;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* given) {
            Image whole{UINTPTR_MAX, 0};
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                auto& part = info->dlpi_phdr[i];
                if (part.p_type != PT_LOAD) continue;
                whole.begin = std::min<uintptr_t>(whole.begin, info->dlpi_addr + part.p_vaddr);
                whole.end = std::max<uintptr_t>(whole.end, info->dlpi_addr + part.p_vaddr + part.p_memsz);
            }
            auto here = reinterpret_cast<uintptr_t>(&find_image);
            if (here < whole.begin || here >= whole.end) return 0;
            *static_cast<Image*>(given) = whole;
            return 1;
        },
        &image);
    return image;
}

bool is_argument_or_constant(const void* address, size_t bytes) {
    static const Image image = find_image();
    auto place = reinterpret_cast<uintptr_t>(address), context = reinterpret_cast<uintptr_t>(launch_now.context);
    return (place >= context && place + bytes <= context + launch_now.context_bytes) || (place >= image.begin && place + bytes <= image.end);
}

std::string nearest(const void* address) {
    std::string text;
    size_t best = SIZE_MAX;
    auto place = reinterpret_cast<uintptr_t>(address);
    for (auto* shadows : {&global_shadows, &shared_shadows})
        for (auto& shadow : *shadows) {
            auto begin = reinterpret_cast<uintptr_t>(shadow.begin), end = begin + shadow.bytes;
            size_t distance = place < begin ? begin - place : place - end;
            if (distance >= best && !(place >= begin && place < end)) continue;
            best = distance;
            text = shadow.name + " (" + std::to_string(shadow.bytes) + " bytes) + " + std::to_string(static_cast<intptr_t>(place - begin));
        }
    return text.empty() ? "memory, where nothing is registered" : text;
}
}  // namespace

void access(const void* address, size_t bytes, Kind kind, bool atomic) {
    auto& l = launch_now;
    if (l.current == nullptr || l.current->fiber.owns(address)) return;
    Moment moment = now();
    moment.atomic = atomic;
    for (auto* shadows : {&shared_shadows, &global_shadows})
        for (auto& shadow : *shadows) {
            if (!shadow.contains(address, bytes)) continue;
            auto wrong = shadow.touch(address, bytes, kind, moment, shadow.shared ? l.block_epoch : l.first_epoch);
            if (!wrong.empty()) report(wrong);
            if (bytes > 1 && bytes <= 16 && reinterpret_cast<uintptr_t>(address) % bytes != 0)
                give_up("unaligned: " + describe(moment) + " accesses " + std::to_string(bytes) + " bytes of " + shadow.name);
            return;
        }
    if (kind == Kind::read && is_argument_or_constant(address, bytes)) return;
    give_up("out of bounds: " + describe(moment) + (kind == Kind::write ? " writes " : " reads ") + std::to_string(bytes) + " bytes of " + nearest(address));
}

void touch(const void* address, size_t bytes, bool write) { access(address, bytes, write ? Kind::write : Kind::read, false); }
void touch_atomically(void* address, size_t bytes) { access(address, bytes, Kind::write, true); }

}  // namespace emulation

using emulation::access;
using emulation::Kind;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define EMULATED_ACCESS(bytes)                                                                   \
    void __tsan_read##bytes(void* address) { access(address, bytes, Kind::read, false); }        \
    void __tsan_write##bytes(void* address) { access(address, bytes, Kind::write, false); }      \
    void __tsan_unaligned_read##bytes(void* address) { access(address, bytes, Kind::read, false); } \
    void __tsan_unaligned_write##bytes(void* address) { access(address, bytes, Kind::write, false); }
EMULATED_ACCESS(1)
EMULATED_ACCESS(2)
EMULATED_ACCESS(4)
EMULATED_ACCESS(8)
EMULATED_ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) { access(address, bytes, Kind::read, false); }
void __tsan_write_range(void* address, size_t bytes) { access(address, bytes, Kind::write, false); }
}
