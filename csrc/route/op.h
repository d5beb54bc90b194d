// What the op `route` is called with. Shapes as in megatron/kernels/route/__init__.py.
#pragma once

#include <cstdint>

#include "../include/dtype.h"

// Numbers are float32 or float64, as `dtype` says.
struct Selected {
  int64_t N, C, K, P;
  double scale;
  bool normalize;
  Dtype dtype;
  int threads;
};

struct Route : Selected {
  const void* logit;      // [N, C]
  const int64_t* rows_P;  // [P], not negative, summing to N
  void* weight;           // [N, K]
  int64_t* choice;        // [N, K]
  void* probability;      // [N, C]
  void* logsumexp;        // [N]
  void* total;            // [P, C]
  void* entropy;          // [1]
  int64_t* order;         // [N * K]
  int64_t* inverse;       // [N, K]
  int64_t* rows_G;        // [P * C]
};

struct RouteBackward : Selected {
  const void* grad_weight;       // [N, K]; nullptr: no gradient, here and below
  const void* grad_probability;  // [N, C]
  const void* grad_logsumexp;    // [N]
  const void* grad_total;        // [P, C]
  const void* probability;       // [N, C]
  const int64_t* choice;         // [N, K]
  const int64_t* rows_P;
  void* grad_logit;              // [N, C]
};

// Which experts the tokens of a sequence share with the token before.
struct ChoiceStatistics {
  const int64_t* choice;  // [T, K]; E marks an empty choice
  int64_t T, K, E, length;
  int64_t used;           // out: choices that are not empty
  int64_t changed;        // out: experts that one of two neighbours uses and the other does not, over all pairs of neighbours
};
