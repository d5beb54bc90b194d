// What causal self-attention is called with. Shapes as in megatron/kernels/attention/__init__.py.
#pragma once

#include <cstdint>

namespace attention {

// A tensor [batch, heads, length, dim]: its first number, and its strides in numbers. The last stride is 1.
struct Heads {
  void* data;
  int64_t batch, head, row;
};

// Cosines and sines of the angles that queries and keys are turned by, [length, pairs] for each text. nullptr: nothing is turned.
struct Angles {
  const float *cosines, *sines;
  int64_t batch;  // from one text to the next; 0: all texts have the same
  int64_t pairs;  // of dimensions that are turned: d and d + pairs
};

struct Problem {
  int64_t batch, heads, kv_heads, length, dim;
  float scale;  // of the scores
  bool is_bf16;  // queries, keys, values, output and gradients; else float
  int threads;
  Heads query, key, value, output;
  Angles angles;
  float* log_sum;  // [batch, heads, length]: log(sum(exp(score)))
};

struct Gradients {
  Heads output;             // given
  Heads query, key, value;  // computed
};

}  // namespace attention
