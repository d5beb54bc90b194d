// A linear layer for a few rows. Shapes as in megatron/kernels/decode/__init__.py.
#pragma once

#include <cstdint>

// A matrix as it lies in memory, each row with a scale where the numbers are int8.
struct DecodeMatrix {
  const void* weight = nullptr;   // null: there is none
  const float* scale = nullptr;   // one for each row; null unless int8
  int format = 0;                 // a Dtype of dtype.h, or 3: int8
};
constexpr int INT8 = 3;

// What is done to a row before it is multiplied.
struct DecodeInput {
  int kind = 0;  // 0 nothing, 1 RMSNorm, 2 LayerNorm, 3 activation, 4 gate: row [up ; gate] -> act(gate) * up
  const float *scale = nullptr, *shift = nullptr;  // of a norm; null: none
  double epsilon = 0;
  int activation = 0;
};

struct DecodeLinear {
  DecodeMatrix matrix;  // [O, K]
  int64_t O, K;
  const float* bias;  // [O]; null: none
  DecodeInput input;
  // of a call
  const float* x;  // [N, K], or [N, 2K] of a gate
  float* y;        // [N, O]
  int64_t N;
  bool add;  // y += instead of y =
  int threads;
};
