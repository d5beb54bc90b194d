// Products of a few rows with a large matrix, which is read once, as it lies in memory: what decoding does.
//
// A step takes 2 * LANES numbers of a matrix and widens them to two vectors. Of bf16 the first vector holds the even numbers and the second the odd
// ones: two shifts instead of a shuffle. The rows are brought into the same order (`arrange`), so that no sum changes. What is left of a row of the
// matrix after whole steps is taken number by number.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "numbers.h"

namespace NEOX_ISA {
namespace few_rows {

constexpr int64_t STEP = 2 * LANES<float>;

struct Two {
  Vec<float> first, second;
};

inline Two wide_step(const float* from) { return {load(from), load(from + LANES<float>)}; }
inline Two wide_step(const bf16* from) {
  const Words bits = *reinterpret_cast<const typename Vector<uint32_t>::unaligned*>(from);
  return {reinterpret_cast<Vec<float>>(bits << 16), reinterpret_cast<Vec<float>>(bits & 0xffff0000u)};
}
// GCC takes a conversion of bytes apart, number by number; the instruction has to be named.
inline Vec<float> wide_bytes(const int8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
  Vec<float> wide;
  for (int i = 0; i < LANES<float>; i++) wide[i] = float(from[i]);
  return wide;
#endif
}
inline Two wide_step(const int8_t* from) { return {wide_bytes(from), wide_bytes(from + LANES<float>)}; }
inline float wide_one(float x) { return x; }
inline float wide_one(bf16 x) { return widen(x); }
inline float wide_one(int8_t x) { return float(x); }

// The place of number k of a row, in the order of the steps of a matrix of W.
template <class W>
inline int64_t place(int64_t k, int64_t) {
  return k;
}
template <>
inline int64_t place<bf16>(int64_t k, int64_t n) {
  if (k >= n / STEP * STEP) return k;
  const int64_t in_step = k % STEP;
  return k - in_step + in_step / 2 + in_step % 2 * LANES<float>;
}

// to = a row of n numbers in the order of the steps.
template <class W>
inline void arrange(float* to, const float* from, int64_t n) {
  if constexpr (sizeof(W) != 2) {
    if (to != from) std::memcpy(to, from, n * sizeof(float));
  } else {
    for (int64_t k = 0; k < n; k++) to[place<W>(k, n)] = from[k];
  }
}

inline float sum_of(Vec<float> v) {
  float sum = 0;
  for (int i = 0; i < LANES<float>; i++) sum += v[i];
  return sum;
}

// A matrix is read along several rows at once, `apart` rows from each other: as many streams keep memory busy as one long row cannot.

// out[o * apart * out_stride + r] = row o * apart of the matrix times row r of x, both of n numbers; x is arranged.
template <class W, int ROWS, int RIGHT>
inline void dots(const W* matrix, int64_t apart, const float* x, int64_t x_stride, int64_t n, float* out, int64_t out_stride) {
  constexpr int CHAINS = RIGHT == 1 ? 2 : 1;  // enough independent sums to hide the latency of an addition
  Vec<float> sums[ROWS][RIGHT][CHAINS] = {};
  int64_t k = 0;
  for (; k + STEP <= n; k += STEP) {
    NEOX_UNROLL for (int o = 0; o < ROWS; o++) {
      const Two w = wide_step(matrix + o * apart * n + k);
      NEOX_UNROLL for (int r = 0; r < RIGHT; r++) {
        const float* row = x + r * x_stride + k;
        sums[o][r][0] += w.first * load(row);
        sums[o][r][CHAINS - 1] += w.second * load(row + LANES<float>);
      }
    }
  }
  for (int o = 0; o < ROWS; o++)
    for (int r = 0; r < RIGHT; r++) {
      float sum = CHAINS == 2 ? sum_of(sums[o][r][0] + sums[o][r][1]) : sum_of(sums[o][r][0]);
      for (int64_t rest = k; rest < n; rest++) sum += wide_one(matrix[o * apart * n + rest]) * x[r * x_stride + rest];
      out[o * apart * out_stride + r] = sum;
    }
}

template <class W, int RIGHT>
inline void dots_of(const W* matrix, int64_t rows, const float* x, int64_t x_stride, int64_t n, float* out, int64_t out_stride) {
  constexpr int AT_ONCE = RIGHT == 4 ? 2 : 4;
  const int64_t apart = rows / AT_ONCE;
  for (int64_t o = 0; o < apart; o++) dots<W, AT_ONCE, RIGHT>(matrix + o * n, apart, x, x_stride, n, out + o * out_stride, out_stride);
  for (int64_t o = apart * AT_ONCE; o < rows; o++) dots<W, 1, RIGHT>(matrix + o * n, 0, x, x_stride, n, out + o * out_stride, out_stride);
}

// out[o * out_stride + r] = row o of `rows` rows of the matrix times row r of the `right` rows of x.
template <class W>
inline void dots_of(const W* matrix, int64_t rows, const float* x, int64_t right, int64_t x_stride, int64_t n, float* out, int64_t out_stride) {
  constexpr int64_t BLOCK = 64;  // rows that stay in the second cache while the rows of x go by
  for (int64_t o = 0; o < rows; o += BLOCK) {
    const int64_t here = rows - o < BLOCK ? rows - o : BLOCK;
    const W* block = matrix + o * n;
    float* to = out + o * out_stride;
    int64_t r = 0;
    for (; r + 4 <= right; r += 4) dots_of<W, 4>(block, here, x + r * x_stride, x_stride, n, to + r, out_stride);
    for (; r + 2 <= right; r += 2) dots_of<W, 2>(block, here, x + r * x_stride, x_stride, n, to + r, out_stride);
    for (; r < right; r++) dots_of<W, 1>(block, here, x + r * x_stride, x_stride, n, to + r, out_stride);
  }
}

// y[r] += the sum over ROWS rows f * apart of the matrix of factor[f * apart * factor_stride + r] times the row; y is arranged.
template <class W, int ROWS, int RIGHT>
inline void add_rows(const W* matrix, int64_t apart, int64_t n, const float* factor, int64_t factor_stride, float* y, int64_t y_stride) {
  Vec<float> wide[ROWS][RIGHT];
  for (int f = 0; f < ROWS; f++)
    for (int r = 0; r < RIGHT; r++) wide[f][r] = all(factor[f * apart * factor_stride + r]);
  int64_t d = 0;
  for (; d + STEP <= n; d += STEP) {
    Two sums[RIGHT];
    NEOX_UNROLL for (int r = 0; r < RIGHT; r++) sums[r] = {load(y + r * y_stride + d), load(y + r * y_stride + d + LANES<float>)};
    NEOX_UNROLL for (int f = 0; f < ROWS; f++) {
      const Two w = wide_step(matrix + f * apart * n + d);
      NEOX_UNROLL for (int r = 0; r < RIGHT; r++) sums[r].first += wide[f][r] * w.first, sums[r].second += wide[f][r] * w.second;
    }
    NEOX_UNROLL for (int r = 0; r < RIGHT; r++) store(y + r * y_stride + d, sums[r].first), store(y + r * y_stride + d + LANES<float>, sums[r].second);
  }
  for (; d < n; d++)
    for (int f = 0; f < ROWS; f++)
      for (int r = 0; r < RIGHT; r++) y[r * y_stride + d] += factor[f * apart * factor_stride + r] * wide_one(matrix[f * apart * n + d]);
}

template <class W, int ROWS>
inline void add_rows_to(const W* matrix, int64_t apart, int64_t n, const float* factor, int64_t factor_stride, float* y, int64_t right, int64_t y_stride) {
  int64_t r = 0;
  for (; r + 2 <= right; r += 2) add_rows<W, ROWS, 2>(matrix, apart, n, factor + r, factor_stride, y + r * y_stride, y_stride);
  for (; r < right; r++) add_rows<W, ROWS, 1>(matrix, apart, n, factor + r, factor_stride, y + r * y_stride, y_stride);
}

// The same for `rows` rows and `right` rows of y.
template <class W>
inline void add_rows_of(const W* matrix, int64_t rows, int64_t n, const float* factor, int64_t factor_stride, float* y, int64_t right, int64_t y_stride) {
  constexpr int64_t BLOCK = 32;
  for (int64_t first = 0; first < rows; first += BLOCK) {
    const int64_t here = rows - first < BLOCK ? rows - first : BLOCK, apart = here / 4;
    const W* block = matrix + first * n;
    const float* by = factor + first * factor_stride;
    for (int64_t f = 0; f < apart; f++) add_rows_to<W, 4>(block + f * n, apart, n, by + f * factor_stride, factor_stride, y, right, y_stride);
    for (int64_t f = apart * 4; f < here; f++) add_rows_to<W, 1>(block + f * n, 0, n, by + f * factor_stride, factor_stride, y, right, y_stride);
  }
}

// The part [first, end) of `total` things that thread `thread` of `threads` takes, in whole `grain`s.
struct Part {
  int64_t first, end;
};
inline Part part_of(int64_t total, int64_t grain, int64_t thread, int64_t threads) {
  const int64_t grains = (total + grain - 1) / grain;
  const int64_t first = grains * thread / threads * grain, end = grains * (thread + 1) / threads * grain;
  return {first < total ? first : total, end < total ? end : total};
}

}  // namespace few_rows
}  // namespace NEOX_ISA
