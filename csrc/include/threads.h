// Work shared out among threads, and memory for them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../memory/heap.h"

namespace NEOX_ISA {

struct Release {
  void operator()(void* memory) const {
    if (!heap::put(memory)) std::free(memory);
  }
};
template <class T>
using Buffer = std::unique_ptr<T[], Release>;

// Uninitialised memory at a cache line's border. Throws std::bad_alloc.
template <class T>
inline Buffer<T> allocate(int64_t n) {
  const size_t size = (size_t(n > 0 ? n : 1) * sizeof(T) + 63) / 64 * 64;
  void* memory = heap::get(size);
  if (memory == nullptr) memory = std::aligned_alloc(64, size);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

// Memory of one thread that is kept from call to call and grows when more is asked for. Inside a parallel region nothing may be thrown: a thread
// that gets no memory ends the process, as the system's own out-of-memory handling would.
template <class T, int PURPOSE>
inline T* scratch(int64_t n) {
  static thread_local Buffer<T> memory;
  static thread_local int64_t size = 0;
  if (size < n) {
    memory.reset();
    memory = allocate<T>(n);
    size = n;
  }
  return memory.get();
}

}  // namespace NEOX_ISA
