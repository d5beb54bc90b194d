// What the ops of row permutation are called with. Shapes as in megatron/kernels/permute/__init__.py.
#pragma once

#include <cstdint>

#include "../include/dtype.h"

// What went wrong, or what came out.
struct Sorted {
  int64_t rows;       // R: choices that are not empty; -1 if a group is out of range
  int64_t bad_group;  // that group
};

struct SortByGroup {
  const int64_t* group;  // [N]
  int64_t* order;        // [N], the first R of them filled
  int64_t* inverse;      // [N]
  int64_t* rows;         // [G]
  int64_t N, G;
  bool padded;           // group G marks an empty choice
  int threads;
};

struct GatherRows {
  const void* x;         // [T] rows of `row_bytes`
  const int64_t* order;  // [R]
  void* rows;            // [R] rows
  int64_t T, K, R, row_bytes;
  int threads;
};

struct CombineRows {
  const void* rows;        // [R, D]
  const int64_t* inverse;  // [T, K]
  const void* weight;      // [T, K] in the type of sums: float64 for float64, else float32; nullptr: all are 1
  void* y;                 // [T, D]
  int64_t T, K, R, D;
  Dtype dtype;
  int threads;
};

struct CombineBackward {
  const void* grad;      // [T, D]
  const void* rows;      // [R, D]
  const int64_t* order;  // [R]
  const void* weight;    // [T, K] in the type of sums
  void* grad_rows;       // [R, D]
  void* grad_weight;     // [T, K] in the type of sums; zero where no row stands
  int64_t T, K, R, D;
  Dtype dtype;
  int threads;
};

constexpr int64_t NONE_BAD = -1;  // else the functions below return the first place whose index is out of range; then the result is not complete
