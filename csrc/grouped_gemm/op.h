// What the grouped matrix product is called with. Shapes as in megatron/kernels/grouped_gemm/__init__.py.
#pragma once

#include <cstdint>

#include "../include/dtype.h"

struct GroupedMatmul {
  const void* x;       // [R, K]
  const void* weight;  // [E, K, N], or [E, N, K] if transposed
  void* y;             // [R, N]
  const int64_t* rows; // [E], not negative, summing to R
  int64_t E, R, K, N;
  bool transposed;
  Dtype dtype;
  int threads;
};

struct GroupedOuter {
  const void* x;  // [R, M]
  const void* y;  // [R, N]
  void* out;      // [E, M, N]
  const int64_t* rows;
  int64_t E, R, M, N;
  Dtype dtype;
  int threads;
};
