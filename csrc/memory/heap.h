// A heap for large blocks, apart from malloc's: see heap.cpp.
#pragma once

#include <cstddef>

namespace heap {

// Whether blocks from now on come from here. At first they do not. Returns whether they did before.
bool use(bool yes);
// n bytes at a cache line's border, uninitialised; nullptr where it is not used, n is small, or the system gives no address space.
void* get(size_t n);
// False: this block is from elsewhere.
bool put(void* block);
// Returns the memory of free blocks to the system.
void trim();
// Bytes of all blocks that were not put back.
size_t used();

}  // namespace heap
