// Products of a few rows with a large matrix, which is read once, as it lies in memory: what decoding does.
//
// A step takes 2 * LANES numbers of a matrix and widens them to two vectors. Of bf16 the first vector holds the even numbers and the second the odd
// ones: two shifts instead of a shuffle. The rows are brought into the same order (`arrange`), so that no sum changes. What is left of a row of the
// matrix after whole steps is taken number by number.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <limits>

#include "numbers.h"

namespace NEOX_ISA {
namespace few_rows {

constexpr int64_t STEP = 2 * LANES<float>;

struct Two {
  Vec<float> first, second;
};

inline Two wide_step(const float* from) { return {load(from), load(from + LANES<float>)}; }
inline Two wide_step(const bf16* from) {
  typedef uint32_t Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));  // a row may begin at any number
  const Words bits = *reinterpret_cast<const Unaligned*>(from);
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

// A row that int8 weights multiply is rounded to whole numbers of 16 bits, so that two products take one instruction and sums are exact: first its
// scale, then the numbers. Weights of 8 bits lose a hundred times as much.
constexpr int64_t SAFE_STEPS = 256;  // so many steps of two products each cannot overflow 32 bits
typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t ShortsUnaligned __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

inline Shorts load_whole(const float* row, int64_t k) { return *reinterpret_cast<const ShortsUnaligned*>(reinterpret_cast<const char*>(row + 1) + 2 * k); }
inline int32_t whole_one(const float* row, int64_t k) {
  int16_t whole;
  std::memcpy(&whole, reinterpret_cast<const char*>(row + 1) + 2 * k, 2);
  return whole;
}
inline Shorts wide_whole(const int8_t* from) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Shorts>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Shorts>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Shorts wide;
  for (int64_t i = 0; i < STEP; i++) wide[i] = from[i];
  return wide;
#endif
}
// The sums of neighbouring products.
inline Ints products(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  Ints sums;
  for (int i = 0; i < LANES<float>; i++) sums[i] = int32_t(a[2 * i]) * b[2 * i] + int32_t(a[2 * i + 1]) * b[2 * i + 1];
  return sums;
#endif
}

// How many floats an arranged row of n numbers takes, for a matrix of W.
template <class W>
inline int64_t row_width(int64_t n) {
  return sizeof(W) == 1 ? 1 + (n + 1) / 2 : n;
}

// to = the scale of a row, and its n numbers as whole multiples of it. A row with a number that is not finite gets the scale NaN.
inline void round_row(float* to, const float* from, int64_t n) {
  constexpr float LARGEST = 32767, TO_INTEGER = 12582912;  // 1.5 * 2^23: the sum's last bits are the integer
  float largest = 0, lost = 0;
  for (int64_t k = 0; k < n; k++) {
    const float size = std::fabs(from[k]);
    largest = size > largest ? size : largest;
    lost += from[k] * 0;
  }
  const float scale = largest / LARGEST + lost, inverse = scale >= std::numeric_limits<float>::min() ? 1 / scale : 0;
  to[0] = scale;
  char* numbers = reinterpret_cast<char*>(to + 1);
  for (int64_t k = 0; k < n; k++) {
    const float sum = from[k] * inverse + TO_INTEGER;
    int32_t bits;
    std::memcpy(&bits, &sum, 4);
    const int16_t whole = int16_t(bits);
    std::memcpy(numbers + 2 * k, &whole, 2);
  }
}

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

// A step of a row that is in its own order, in the order of bf16's steps, and back.
inline Two split_step(const float* from) {
  const Vec<float> a = load(from), b = load(from + LANES<float>);
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  return {reinterpret_cast<Vec<float>>(_mm512_permutex2var_ps(x, even, y)), reinterpret_cast<Vec<float>>(_mm512_permutex2var_ps(x, odd, y))};
#elif defined(__AVX2__)
  const __m256 x = reinterpret_cast<__m256>(a), y = reinterpret_cast<__m256>(b);
  const auto ordered = [](__m256 v) { return reinterpret_cast<Vec<float>>(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); };
  return {ordered(_mm256_shuffle_ps(x, y, 0x88)), ordered(_mm256_shuffle_ps(x, y, 0xdd))};
#else
  Two to;
  for (int i = 0; i < LANES<float>; i++) to.first[i] = from[2 * i], to.second[i] = from[2 * i + 1];
  return to;
#endif
}
inline void join_step(float* to, Two two) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 x = reinterpret_cast<__m512>(two.first), y = reinterpret_cast<__m512>(two.second);
  store(to, reinterpret_cast<Vec<float>>(_mm512_permutex2var_ps(x, low, y)));
  store(to + LANES<float>, reinterpret_cast<Vec<float>>(_mm512_permutex2var_ps(x, high, y)));
#elif defined(__AVX2__)
  const __m256 x = reinterpret_cast<__m256>(two.first), y = reinterpret_cast<__m256>(two.second);
  const __m256 low = _mm256_unpacklo_ps(x, y), high = _mm256_unpackhi_ps(x, y);
  store(to, reinterpret_cast<Vec<float>>(_mm256_permute2f128_ps(low, high, 0x20)));
  store(to + LANES<float>, reinterpret_cast<Vec<float>>(_mm256_permute2f128_ps(low, high, 0x31)));
#else
  for (int i = 0; i < LANES<float>; i++) to[2 * i] = two.first[i], to[2 * i + 1] = two.second[i];
#endif
}

// to = a row of n numbers in the order of the steps. `to` is other memory than `from`.
template <class W>
inline void arrange(float* to, const float* from, int64_t n) {
  if constexpr (sizeof(W) == 1) {
    round_row(to, from, n);
  } else if constexpr (sizeof(W) != 2) {
    std::memcpy(to, from, n * sizeof(float));
  } else {
    int64_t k = 0;
    for (; k + STEP <= n; k += STEP) {
      const Two two = split_step(from + k);
      store(to + k, two.first), store(to + k + LANES<float>, two.second);
    }
    for (; k < n; k++) to[k] = from[k];
  }
}
// The way back.
template <class W>
inline void restore(float* to, const float* from, int64_t n) {
  if constexpr (sizeof(W) != 2) {
    std::memcpy(to, from, n * sizeof(float));
  } else {
    int64_t k = 0;
    for (; k + STEP <= n; k += STEP) join_step(to + k, {load(from + k), load(from + k + LANES<float>)});
    for (; k < n; k++) to[k] = from[k];
  }
}

// The sum of a vector's numbers, in halves; every row of a matrix ends with one.
inline float sum_of(Vec<float> v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512 whole = reinterpret_cast<__m512>(v);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1)));
#else
  const __m256 eight = reinterpret_cast<__m256>(v);
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float sum = 0;
  for (int i = 0; i < LANES<float>; i++) sum += v[i];
  return sum;
#endif
}

// A matrix is read along several rows at once, `apart` rows from each other: as many streams keep memory busy as one long row cannot. However many
// rows are taken at once, each sum has one order: a row's results do not depend on the other rows of a call.

// out[o * apart * out_stride + r] = row o * apart of the matrix times row r of x, both of n numbers; x is arranged. AHEAD: how many rows further down
// the matrix is fetched into the cache.
template <class W, int ROWS, int RIGHT, int64_t AHEAD = 0>
inline void dots(const W* matrix, int64_t apart, const float* x, int64_t x_stride, int64_t n, float* out, int64_t out_stride) {
  Vec<float> sums[ROWS][RIGHT] = {};
  int64_t k = 0;
  for (; k + STEP <= n; k += STEP) {
    NEOX_UNROLL for (int o = 0; o < ROWS; o++) {
      const Two w = wide_step(matrix + o * apart * n + k);
      if constexpr (AHEAD != 0) __builtin_prefetch(matrix + (AHEAD + o * apart) * n + k, 0, 2);
      NEOX_UNROLL for (int r = 0; r < RIGHT; r++) {
        const float* row = x + r * x_stride + k;
        sums[o][r] += w.first * load(row);
        sums[o][r] += w.second * load(row + LANES<float>);
      }
    }
  }
  for (int o = 0; o < ROWS; o++)
    for (int r = 0; r < RIGHT; r++) {
      float sum = sum_of(sums[o][r]);
      for (int64_t rest = k; rest < n; rest++) sum += wide_one(matrix[o * apart * n + rest]) * x[r * x_stride + rest];
      out[o * apart * out_stride + r] = sum;
    }
}

// The same for int8: exact sums of whole numbers, times the scale of the row of x.
template <int ROWS, int RIGHT, int64_t AHEAD = 0>
inline void whole_dots(const int8_t* matrix, int64_t apart, const float* x, int64_t x_stride, int64_t n, float* out, int64_t out_stride) {
  Vec<float> totals[ROWS][RIGHT] = {};
  int64_t k = 0;
  while (k + STEP <= n) {
    Ints sums[ROWS][RIGHT] = {};
    for (const int64_t end = k + SAFE_STEPS * STEP; k + STEP <= n && k < end; k += STEP) {
      NEOX_UNROLL for (int o = 0; o < ROWS; o++) {
        const Shorts w = wide_whole(matrix + o * apart * n + k);
        if constexpr (AHEAD != 0) __builtin_prefetch(matrix + (AHEAD + o * apart) * n + k, 0, 2);
        NEOX_UNROLL for (int r = 0; r < RIGHT; r++) sums[o][r] += products(w, load_whole(x + r * x_stride, k));
      }
    }
    for (int o = 0; o < ROWS; o++)
      for (int r = 0; r < RIGHT; r++) totals[o][r] += __builtin_convertvector(sums[o][r], Vec<float>);
  }
  for (int o = 0; o < ROWS; o++)
    for (int r = 0; r < RIGHT; r++) {
      int64_t left = 0;  // of the last numbers, fewer than a step
      for (int64_t rest = k; rest < n; rest++) left += int32_t(matrix[o * apart * n + rest]) * whole_one(x + r * x_stride, rest);
      out[o * apart * out_stride + r] = (sum_of(totals[o][r]) + float(left)) * x[r * x_stride];
    }
}
template <class W, int ROWS, int RIGHT, int64_t AHEAD = 0>
inline void products_of(const W* matrix, int64_t apart, const float* x, int64_t x_stride, int64_t n, float* out, int64_t out_stride) {
  if constexpr (sizeof(W) == 1) whole_dots<ROWS, RIGHT, AHEAD>(matrix, apart, x, x_stride, n, out, out_stride);
  else dots<W, ROWS, RIGHT, AHEAD>(matrix, apart, x, x_stride, n, out, out_stride);
}

// Rows of a matrix in blocks of BLOCK. In a block, AT_ONCE rows are read side by side: far from each other, or neighbours where a row is so short that
// its stream would end before memory has begun to bring it.
constexpr int64_t BLOCK = 64;
constexpr int64_t SHORT_ROW = 1024;  // bytes
struct Grouping {
  int64_t apart, step;  // between the rows of a group, and between the first rows of two groups
};
template <class W>
inline Grouping grouping(int64_t rows, int64_t at_once, int64_t n) {
  if (n * int64_t(sizeof(W)) < SHORT_ROW) return {1, at_once};
  return {rows / at_once, 1};
}

// out[r] = ROWS rows of the matrix times all rows of x, two at a time. While the second two are multiplied, memory is free to bring the next row.
template <class W, int ROWS>
inline void dots_with_all(const W* matrix, int64_t apart, const float* x, int64_t right, int64_t x_stride, int64_t n, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + 2 <= right; r += 2) {
    if (r == 2) products_of<W, ROWS, 2, 1>(matrix, apart, x + r * x_stride, x_stride, n, out + r, out_stride);
    else products_of<W, ROWS, 2>(matrix, apart, x + r * x_stride, x_stride, n, out + r, out_stride);
  }
  for (; r < right; r++) products_of<W, ROWS, 1>(matrix, apart, x + r * x_stride, x_stride, n, out + r, out_stride);
}

// out[o * out_stride + r] = row o of `rows` rows of the matrix times row r of the `right` rows of x.
template <class W>
inline void dots_of(const W* matrix, int64_t rows, const float* x, int64_t right, int64_t x_stride, int64_t n, float* out, int64_t out_stride) {
  for (int64_t first = 0; first < rows; first += BLOCK) {
    const int64_t here = rows - first < BLOCK ? rows - first : BLOCK, at_once = right == 1 ? 8 : 4, groups = here / at_once;
    const Grouping grouped = grouping<W>(here, at_once, n);
    const W* block = matrix + first * n;
    float* to = out + first * out_stride;
    for (int64_t g = 0, o = 0; g < groups; g++, o += grouped.step) {
      if (right == 1) products_of<W, 8, 1>(block + o * n, grouped.apart, x, x_stride, n, to + o * out_stride, out_stride);
      else dots_with_all<W, 4>(block + o * n, grouped.apart, x, right, x_stride, n, to + o * out_stride, out_stride);
    }
    for (int64_t o = groups * at_once; o < here; o++) dots_with_all<W, 1>(block + o * n, 0, x, right, x_stride, n, to + o * out_stride, out_stride);
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
  for (int64_t first = 0; first < rows; first += BLOCK) {
    const int64_t here = rows - first < BLOCK ? rows - first : BLOCK, groups = here / 4;
    const Grouping grouped = grouping<W>(here, 4, n);
    const W* block = matrix + first * n;
    const float* by = factor + first * factor_stride;
    for (int64_t g = 0, f = 0; g < groups; g++, f += grouped.step)
      add_rows_to<W, 4>(block + f * n, grouped.apart, n, by + f * factor_stride, factor_stride, y, right, y_stride);
    for (int64_t f = groups * 4; f < here; f++) add_rows_to<W, 1>(block + f * n, 0, n, by + f * factor_stride, factor_stride, y, right, y_stride);
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
