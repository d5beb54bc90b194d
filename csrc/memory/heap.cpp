// A heap for large blocks, apart from malloc's.
//
// A training step asks for the same large blocks and frees them in every step. In malloc's heap small blocks settle between them and stay, and glibc
// before 2.38 puts no aligned block into a gap of its own size: up to a tenth of the memory is gaps in the end. Here a block goes into the smallest gap
// that holds it, and gaps that touch are one. What lies behind the last block was never touched, so it is no memory yet, only addresses.
#include "heap.h"

#include <cstdint>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace heap {
namespace {

constexpr size_t LARGE = size_t(1) << 20;  // smaller blocks are malloc's: the next one gets the place of the last, which is in the cache still
constexpr size_t LINE = 64;
constexpr size_t STAGGER = 5 * LINE;  // else blocks of one size would begin at the same place of a page, and their rows share few places of the cache
constexpr size_t PAGE = 4096;
constexpr size_t REGION = size_t(1) << 34, SMALL_REGION = size_t(1) << 28;  // addresses that are asked for at once; where they are counted

size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// Whether the system counts addresses as memory: a limit of the process (ulimit -v), or no overcommitment.
bool addresses_count() {
  rlimit limit{};
  int overcommit = 0;
  std::ifstream("/proc/sys/vm/overcommit_memory") >> overcommit;
  return overcommit == 2 || (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY);
}

struct Heap {
  std::mutex mutex;
  std::map<char*, size_t> gaps;
  std::set<std::pair<size_t, char*>> by_size;  // the gaps again
  std::unordered_map<void*, size_t> blocks;
  size_t used = 0;
  const size_t region = addresses_count() ? SMALL_REGION : REGION;

  void add(char* begin, size_t size) {
    const auto after = gaps.lower_bound(begin);
    if (after != gaps.end() && begin + size == after->first) {
      size += after->second;
      remove(after->first, after->second);
    }
    const auto behind = gaps.lower_bound(begin);
    const auto before = behind == gaps.begin() ? gaps.end() : std::prev(behind);
    if (before != gaps.end() && before->first + before->second == begin) {
      begin = before->first;
      size += before->second;
      remove(begin, before->second);
    }
    gaps[begin] = size;
    by_size.insert({size, begin});
  }
  void remove(char* begin, size_t size) {
    gaps.erase(begin);
    by_size.erase({size, begin});
  }
  // A gap of at least n bytes more. Large pages are asked for: there are fewer to look up.
  bool grow(size_t n) {
    for (size_t size = std::max(region, round_up(n, PAGE)); size >= n; size = round_up(size / 2, PAGE)) {
      void* begin = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (begin != MAP_FAILED) {
        madvise(begin, size, MADV_HUGEPAGE);
        add(static_cast<char*>(begin), size);
        return true;
      }
      if (size <= PAGE) break;
    }
    return false;
  }
};

// Never destroyed: blocks are put back while the process ends, too.
Heap& whole() {
  static Heap* heap = new Heap;
  return *heap;
}
std::atomic<bool> in_use{false}, was_used{false};

}  // namespace

bool use(bool yes) {
  if (yes && !was_used.exchange(true)) pthread_atfork([] { whole().mutex.lock(); }, [] { whole().mutex.unlock(); }, [] { whole().mutex.unlock(); });
  return in_use.exchange(yes);
}

void* get(size_t n) {
  if (!in_use || n < LARGE || n > SIZE_MAX / 4) return nullptr;
  n = round_up(n, LINE) + STAGGER;
  Heap& heap = whole();
  const std::lock_guard<std::mutex> lock(heap.mutex);
  if ((heap.by_size.empty() || heap.by_size.rbegin()->first < n) && !heap.grow(n)) return nullptr;
  const auto [size, begin] = *heap.by_size.lower_bound({n, nullptr});
  heap.remove(begin, size);
  if (size > n) heap.add(begin + n, size - n);
  heap.blocks[begin] = n;
  heap.used += n;
  return begin;
}

bool put(void* block) {
  if (!was_used) return false;
  Heap& heap = whole();
  const std::lock_guard<std::mutex> lock(heap.mutex);
  const auto found = heap.blocks.find(block);
  if (found == heap.blocks.end()) return false;
  heap.used -= found->second;
  heap.add(static_cast<char*>(block), found->second);
  heap.blocks.erase(found);
  return true;
}

void trim() {
  if (!was_used) return;
  Heap& heap = whole();
  const std::lock_guard<std::mutex> lock(heap.mutex);
  for (const auto& [begin, size] : heap.gaps) {
    const uintptr_t first = round_up(reinterpret_cast<uintptr_t>(begin), PAGE), last = (reinterpret_cast<uintptr_t>(begin) + size) / PAGE * PAGE;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }
}

size_t used() {
  if (!was_used) return 0;
  const std::lock_guard<std::mutex> lock(whole().mutex);
  return whole().used;
}

}  // namespace heap

#else

namespace heap {
bool use(bool) { return false; }
void* get(size_t) { return nullptr; }
bool put(void*) { return false; }
void trim() {}
size_t used() { return 0; }
}  // namespace heap

#endif
