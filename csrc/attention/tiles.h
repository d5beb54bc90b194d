// Small matrix products whose sums stay in registers.
#pragma once

#include <type_traits>

#include "../include/exponential.h"

namespace NEOX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 12;
#else
constexpr int ROWS = 6;
#endif
constexpr int64_t WIDTH = LANES<float>, PANEL = 2 * WIDTH;

// Numbers from one row to the next: an odd number of cache lines, so that a column uses every set of the cache.
constexpr int64_t odd_lines(int64_t columns) { return ((columns + 15) / 16 | 1) * 16; }

// The left factor of a product; transposed, its rows are columns in memory.
struct Left {
  const float* data;
  int64_t stride;
};

// out (ROWS x VECTORS * WIDTH) = left (ROWS x depth) right (depth x VECTORS * WIDTH), added to what is there if `add`.
template <int VECTORS, bool TRANSPOSED>
inline void multiply(Left left, const float* right, int64_t right_stride, float* out, int64_t out_stride, int64_t depth, bool add) {
  Vec<float> sum[ROWS][VECTORS] = {};
  const float* column = left.data;
  for (int64_t k = 0; k < depth; k++, right += right_stride, column += TRANSPOSED ? left.stride : 1) {
    Vec<float> b[VECTORS];
    NEOX_UNROLL for (int v = 0; v < VECTORS; v++) b[v] = load(right + v * WIDTH);
    NEOX_UNROLL for (int r = 0; r < ROWS; r++) {
      const float a = TRANSPOSED ? column[r] : column[r * left.stride];
      NEOX_UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] += a * b[v];
    }
  }
  NEOX_UNROLL for (int r = 0; r < ROWS; r++) NEOX_UNROLL for (int v = 0; v < VECTORS; v++) {
    float* place = out + r * out_stride + v * WIDTH;
    store(place, add ? load(place) + sum[r][v] : sum[r][v]);
  }
}

// Calls `body(first column, vectors)` for columns in panels of two vectors, the last of one where that is enough.
template <class Body>
inline void for_each_panel(int64_t columns, Body body) {
  int64_t c = 0;
  for (; c + WIDTH < columns; c += PANEL) body(c, std::integral_constant<int, 2>{});
  if (c < columns) body(c, std::integral_constant<int, 1>{});
}

inline float dot(const float* x, const float* y, int64_t count) {
  Vec<float> sum = {};
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) sum += load(x + i) * load(y + i);
  float rest = 0;
  for (; i < count; i++) rest += x[i] * y[i];
  return sum_of(sum) + rest;
}

template <class T>
inline void scale_into(T* to, const float* from, int64_t count, float factor) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store_narrow(to + i, load(from + i) * factor);
  for (; i < count; i++) to[i] = convert<T>(from[i] * factor);
}

}  // namespace
}  // namespace NEOX_ISA
