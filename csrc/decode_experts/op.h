// An expert layer for a few rows: norm, router, experts and residual in one call. Shapes as in megatron/kernels/decode/__init__.py.
#pragma once

#include <cstdint>

#include "../decode_linear/op.h"

// How the K largest of C scores are chosen and weighted.
struct DecodeChoice {
  int64_t C, K;
  bool sigmoid;        // scores are sigmoid(logits), else the softmax over all of them
  bool normalize;      // the weights are divided by their sum
  double scale;
  const float* bias;   // [C], added to the scores for the choice alone; null: none
};

// One projection of all experts. A decomposed one has a left factor, and `matrix` is the right one, [E*F, rank].
struct DecodeProjection {
  DecodeMatrix matrix;  // [E*F, D]; of the down-projection as well: y = h W
  DecodeMatrix left;    // [E*rank, D]
  const float* bias;    // [E, F], or [E, D] of the down-projection; null: none
  DecodeMatrix a, b;    // factors of LoREs, [E*M*Q, D] and [E*M*Q, F]; null: none
};

struct DecodeExperts {
  DecodeInput input;
  DecodeMatrix router;  // [C, D]; null: the choice is given
  DecodeChoice choice;
  int64_t E, D, F, rank;  // rank: of decomposed experts, else 0
  int64_t M, Q;           // LoREs of an expert (0: none) and their rank
  DecodeMatrix lore_router;  // [E*M, D]; null: M is 1, and the LoRE is always on
  DecodeChoice lore_choice;
  DecodeProjection up, gate, down;  // gate.matrix null: no gate. down.matrix: [E*F, D]; decomposed [E*F, rank], with down.left [E*rank, D]
  int activation;
  // of a call
  const float *x, *residual;  // [N, D]; residual null: none
  float* y;                   // [N, D] = residual + result
  int64_t N;
  bool choose, compute;
  int64_t* expert;   // [N, K]: chosen here, or given
  float* weight;     // [N, K]
  const int64_t* slot;  // [N, K]: where the experts lie in the matrices; null: at their numbers
  int64_t* lore;     // [N, K, L]: chosen here; null: nobody asks
  int threads;
};
