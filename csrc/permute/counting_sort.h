// A stable counting sort of keys 0 to G - 1, in blocks that threads may work on at the same time. What comes out does not depend on the number of blocks.
//
// Block b counts its keys in counts(b). `start` then turns the counts into places: group 0 comes first, and within a group the keys of block 0.
// Block b then asks `place` for each of its keys, in the order in which it counted them.
#pragma once

#include "../include/numbers.h"
#include "../include/threads.h"

namespace NEOX_ISA {

class CountingSort {
 public:
  CountingSort(int64_t groups, int blocks) : groups_(groups), blocks_(blocks), counts_(allocate<int64_t>(groups * blocks)) {
    clear(counts_.get(), groups * blocks);
  }

  int64_t* counts(int block) { return counts_.get() + block * groups_; }

  // rows_G gets the counts of all blocks together. Returns how many keys were counted.
  int64_t start(int64_t* rows_G) {
    int64_t place = 0;
    for (int64_t group = 0; group < groups_; group++) {
      const int64_t first = place;
      for (int block = 0; block < blocks_; block++) {
        const int64_t count = counts(block)[group];
        counts(block)[group] = place;
        place += count;
      }
      rows_G[group] = place - first;
    }
    return place;
  }

  int64_t place(int block, int64_t group) { return counts(block)[group]++; }

 private:
  int64_t groups_;
  int blocks_;
  Buffer<int64_t> counts_;
};

// Where the part of block `block` of `blocks` begins; it ends where the next one begins.
inline int64_t block_start(int64_t total, int block, int blocks) { return total / blocks * block + std::min<int64_t>(total % blocks, block); }

}  // namespace NEOX_ISA
