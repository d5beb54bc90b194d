#include "fibers.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

namespace {
char* new_stack() {
    void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    return static_cast<char*>(memory);
}
}  // namespace

#if defined(__x86_64__)
// swapcontext() makes a system call each time; a block of 256 threads switches a thousand times for each step of a product.
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");
extern "C" void emulation_switch(void** from, void* to);

void Fiber::start(void (*body)()) {
    if (stack == nullptr) stack = new_stack();
    auto* top = reinterpret_cast<uintptr_t*>(stack + STACK_BYTES);
    *--top = 0;  // the frame above the body: it must never return
    *--top = reinterpret_cast<uintptr_t>(body);
    for (int i = 0; i < 6; ++i) *--top = 0;
    place = top;
}

void Fiber::switch_to(Fiber& next) { emulation_switch(&place, next.place); }

#else
void Fiber::start(void (*body)()) {
    if (stack == nullptr) stack = new_stack();
    if (place == nullptr) place = new ucontext_t;
    auto* context = static_cast<ucontext_t*>(place);
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK_BYTES;
    context->uc_link = nullptr;
    makecontext(context, body, 0);
}

void Fiber::switch_to(Fiber& next) {
    if (place == nullptr) place = new ucontext_t;
    swapcontext(static_cast<ucontext_t*>(place), static_cast<ucontext_t*>(next.place));
}
#endif

}  // namespace emulation
