// What RMSNorm is called with. Shapes as in megatron/kernels/rms_norm/__init__.py.
#pragma once

#include <cstdint>

struct RmsNorm {
  const void* x;      // [rows, dim]
  const void* scale;  // [groups, dim]; row r has the scale r % groups
  float* inverse;     // [rows]: 1 / sqrt(mean(x^2) + epsilon)
  int64_t rows, groups, dim;
  bool is_bf16;  // all but `inverse`; else float
  int threads;
};

struct RmsNormForward {
  RmsNorm norm;
  void* y;
  double epsilon;
};

struct RmsNormBackward {
  RmsNorm norm;
  const void* grad;  // [rows, dim]
  void *grad_x, *grad_scale;
};
