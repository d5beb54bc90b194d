// Fibers: a stack each, and a switch between them. The threads of a block run on them.
#pragma once

#include <cstddef>

namespace emulation {

constexpr size_t STACK_BYTES = 128 * 1024;

/// A place to go on from. Its stack stays until the process ends; `start` may be called again once the body has ended or is given up.
class Fiber {
public:
    void start(void (*body)());
    void switch_to(Fiber& next);
    bool owns(const void* address) const {
        auto* place = static_cast<const char*>(address);
        return stack != nullptr && place >= stack && place < stack + STACK_BYTES;
    }

private:
    char* stack = nullptr;
    void* place = nullptr;  // the stack pointer, or the context where there is no switch of our own
};

}  // namespace emulation
