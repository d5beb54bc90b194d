// What the output projection and its cross entropy are called with. Shapes and meaning as in megatron/kernels/linear_cross_entropy/__init__.py.
#pragma once

#include <cstdint>

#include "../include/dtype.h"

struct LinearCrossEntropy {
  const void* hidden;     // [T, D]
  const void* weight;     // [V, D]
  const int64_t* labels;  // [T], of 0 to V - 1
  const void* scale;      // [T], as the loss
  void* loss;             // [T]: float, or double where the numbers are
  void* grad_hidden;      // [T, D], of the sum of loss * scale; nullptr: not wanted
  void* grad_weight;      // [V, D], as well
  int64_t T, D, V;  // D and V at least 1
  int64_t rows;  // tokens of a chunk, at least 1
  Dtype dtype;
  int threads;
};
