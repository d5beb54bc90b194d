// The rows that decoding multiplies: normalised or activated, and arranged for a format.
#pragma once

#include <cmath>

#include "../decode_linear/op.h"
#include "activation.h"
#include "dtype.h"
#include "few_rows.h"

namespace NEOX_ISA {

inline void norm_row(const DecodeInput& input, const float* x, int64_t n, float* to) {
  Vec<float> sums = {}, squares = {};
  float sum = 0, square = 0;
  int64_t k = 0;
  const bool centred = input.kind == 2;
  if (centred) {
    for (; k + LANES<float> <= n; k += LANES<float>) sums += load(x + k);
    for (; k < n; k++) sum += x[k];
    sum += few_rows::sum_of(sums);
  }
  const float mean = centred ? sum / float(n) : 0;
  for (k = 0; k + LANES<float> <= n; k += LANES<float>) {
    const Vec<float> v = load(x + k) - mean;
    squares += v * v;
  }
  for (; k < n; k++) square += (x[k] - mean) * (x[k] - mean);
  square += few_rows::sum_of(squares);
  const float inverse = 1 / std::sqrt(square / float(n) + float(input.epsilon));
  for (k = 0; k < n; k++) {
    float y = (x[k] - mean) * inverse;
    if (input.scale != nullptr) y *= input.scale[k];
    if (input.shift != nullptr) y += input.shift[k];
    to[k] = y;
  }
}

// to = act(x), times `by` where it is given; n numbers.
inline void activate_row(int activation, const float* x, const float* by, int64_t n, float* to) {
  with_activation<float>(activation, [&](auto function) {
    using F = decltype(function);
    for (int64_t k = 0; k < n; k += LANES<float>) {
      const Vec<float> y = F::value(take(x + k, n - k));
      put(to + k, by == nullptr ? y : y * take(by + k, n - k), n - k);
    }
  });
}

// A row of n numbers as it is multiplied, in its own order.
inline void prepare_row(const DecodeInput& input, const float* x, int64_t n, float* to) {
  switch (input.kind) {
    case 1:
    case 2: return norm_row(input, x, n, to);
    case 3: return activate_row(input.activation, x, nullptr, n, to);
    case 4: return activate_row(input.activation, x + n, x, n, to);
    default: std::memcpy(to, x, n * sizeof(float));
  }
}
inline int64_t input_width(const DecodeInput& input, int64_t n) { return input.kind == 4 ? 2 * n : n; }

// Calls f with a null pointer to the format's type.
template <class F>
inline void with_format(int format, F f) {
  if (format == INT8) f(static_cast<const int8_t*>(nullptr));
  else if (Dtype(format) == Dtype::bfloat16) f(static_cast<const bf16*>(nullptr));
  else f(static_cast<const float*>(nullptr));
}

template <class W>
inline const W* row_of(const DecodeMatrix& matrix, int64_t row, int64_t width) {
  return static_cast<const W*>(matrix.weight) + row * width;
}

}  // namespace NEOX_ISA
