// What the hidden layer of the experts is called with. Shapes and meaning as in megatron/kernels/grouped_lore/__init__.py.
#pragma once

#include "../grouped_gemm/op.h"

struct LoreProjection {
  const void* weight;  // [E, F, D], or nullptr
  const void* a;       // [G, Q, D], or nullptr
  const void* b;       // [G, Q, F], or nullptr
  const void* bias;    // [E, F], or nullptr
  int64_t Q;
};

struct LoreLayer {
  int64_t E, R, D, F, G, L;  // without a choice: L = 1, G = E
  LoreProjection projections[2];  // up, gate
  bool gated;
  const int64_t* rows;       // [E]
  bool chosen;               // else LoRE e serves all rows of expert e, with pi = 1, and the next four are not read
  const void* pi;            // [R, L]
  const int64_t* order;      // [R * L]: the flat choice r * L + l that stands at place n, sorted by LoRE
  const int64_t* inverse;    // [R, L]: the place of choice (r, l)
  const int64_t* lore_rows;  // [G]
  int activation;            // its place in megatron.kernels.activations.ACTIVATIONS
  Dtype dtype;
  bool pi_is_double;         // else float
  int threads;
};

struct LoreForward {
  LoreLayer layer;
  const void* x;    // [R, D]
  void* hidden;     // [R, F]
  void* before[2];  // [R, F] each: the projections before the activation; nullptr: not saved
  void* u[2];       // [N, Q] each: x A in LoRE order; nullptr: no LoREs
};

struct LoreGradients {
  void *weight, *a, *b, *bias;  // nullptr where the part is absent
};

struct LoreBackward {
  LoreLayer layer;
  const void* grad;      // [R, F]
  const void* x;         // [R, D]
  const void* saved[2];  // the projections before the activation; saved[0] is nullptr where the activation is the identity and there is no gate
  const void* u[2];
  void* grad_x;          // [R, D]
  LoreGradients gradients[2];
  void* grad_pi;         // [R, L], in the format of pi; nullptr without a choice
};
