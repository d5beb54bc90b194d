// What Adam's update is called with. See megatron/kernels/adam/__init__.py.
#pragma once

#include <cstdint>

namespace adam {

// Gradients of `count` tensors: float, or bf16 where `is_bf16` says so.
struct Gradients {
  int64_t count;
  const int64_t* sizes;
  const int64_t* addresses;
  const int64_t* is_bf16;  // 0 or 1
};

struct Settings {
  double rate, beta1, beta2, epsilon, weight_decay;
  bool decoupled;
  double divisor;  // of the gradients
};

struct Update {
  Gradients gradients;
  const int64_t *weights, *averages, *squares;  // addresses of floats
  const int64_t* rounded;                       // addresses of bf16 that take the new weights; 0: none
  const double* steps;                          // this one included
  Settings settings;
};

}  // namespace adam
