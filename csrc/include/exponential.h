// e^x of whole vectors, and what a softmax needs besides.
#pragma once

#include "numbers.h"

namespace NEOX_ISA {

// e^x for x up to 88: relative error below 3e-7; 0 below -87.3; NaN for NaN.
inline Vec<float> exponential(Vec<float> x) {
  constexpr float least = -87.3f, magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number, which stands in the low bits
  const Vec<float> y = x < least ? least - Vec<float>{} : x;
  const Vec<float> shifted = y * 1.44269504f + magic, n = shifted - magic;
  const Vec<float> r = y - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts
  Vec<float> p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const Vec<float> scaled = reinterpret_cast<Vec<float>>(reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23));
  return x >= least ? scaled : (x < least ? Vec<float>{} : x);  // a NaN's bits would be taken for an exponent
}
inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
inline auto sum_of(V x) {
  auto sum = x[0];
  for (size_t i = 1; i < sizeof x / sizeof sum; i++) sum += x[i];
  return sum;
}

template <class V>
inline auto largest_of(V x) {
  auto most = x[0];
  for (size_t i = 1; i < sizeof x / sizeof most; i++) most = x[i] > most ? x[i] : most;
  return most;
}

}  // namespace NEOX_ISA
