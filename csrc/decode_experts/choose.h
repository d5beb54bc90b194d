// The choice of the K best of a row of logits. Of equal scores the first is taken, and a NaN is never better than a number.
#pragma once

#include <cmath>

#include "op.h"

namespace NEOX_ISA {

// `scores` has the logits, and is overwritten.
inline void choose_row(const DecodeChoice& rule, float* scores, int64_t* chosen, float* weight) {
  if (rule.sigmoid) {
    for (int64_t c = 0; c < rule.C; c++) scores[c] = 1 / (1 + std::exp(-scores[c]));
  } else {
    float largest = scores[0], sum = 0;
    for (int64_t c = 1; c < rule.C; c++) largest = scores[c] > largest ? scores[c] : largest;
    for (int64_t c = 0; c < rule.C; c++) sum += scores[c] = std::exp(scores[c] - largest);
    for (int64_t c = 0; c < rule.C; c++) scores[c] /= sum;
  }
  float total = 0;
  for (int64_t k = 0; k < rule.K; k++) {
    int64_t best = -1;
    float highest = 0;
    for (int64_t c = 0; c < rule.C; c++) {
      bool taken = false;
      for (int64_t before = 0; before < k; before++) taken = taken || chosen[before] == c;
      if (taken) continue;
      const float preference = scores[c] + (rule.bias == nullptr ? 0 : rule.bias[c]);
      if (best < 0 || preference > highest || (highest != highest && preference == preference)) best = c, highest = preference;
    }
    chosen[k] = best;
    total += weight[k] = scores[best];
  }
  const float factor = float(rule.scale) / (!rule.normalize ? 1.f : total > 1.17549435e-38f ? total : 1.17549435e-38f);
  for (int64_t k = 0; k < rule.K; k++) weight[k] *= factor;
}

}  // namespace NEOX_ISA
