// Matrix products c[m, n] += a[m, K] b[K, n] of blocks that fit into the caches, for one instruction set.
//
// A `Product` says how its operands lie in memory:
//   a  rows of `Left` numbers, `lda` apart, K contiguous, K rounded up to K_ALIGN with zeros
//   b  panels of NR columns, [n / NR][K][NR] of `Right` numbers; in pairs of K for 16-bit products, [n / NR][K / 2][NR][2]
//   c  rows of `Sum` numbers, `ldc` apart, n rounded up to NR
// Wide<T> multiplies float or double. It serves bf16 too where there are no 16-bit instructions: operands are widened while they are packed.
// Dot multiplies bf16 pairs into float: AVX512-bf16, or AMX tiles.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "../grouped_gemm/op.h"
#include "numbers.h"
#include "threads.h"
#ifdef NEOX_DOT
#include "dot.h"
#endif

namespace NEOX_ISA {

#if defined(__AVX512F__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2;  // vectors in a row of a tile

// ---- packing

constexpr int64_t PACK_ROWS = 8;  // rows that are packed together, from left to right: short runs of many rows would each fetch their lines anew

// to[k][n] = from[n][k] for a square of 8 by 8 floats.
#if defined(__AVX2__)
typedef float Eight __attribute__((vector_size(32)));
typedef float EightUnaligned __attribute__((vector_size(32), aligned(2), may_alias));  // also eight pairs of bf16, which begin at any of them

inline void transpose8(float* to, int64_t ld_to, const Eight (&row)[8]) {
  typedef int32_t Index __attribute__((vector_size(32)));
  const Index low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
  const Index pair_low = {0, 1, 8, 9, 4, 5, 12, 13}, pair_high = {2, 3, 10, 11, 6, 7, 14, 15};
  const Index left = {0, 1, 2, 3, 8, 9, 10, 11}, right = {4, 5, 6, 7, 12, 13, 14, 15};
  Eight t[8], s[8];
  NEOX_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shuffle(row[i], row[i + 1], low);
    t[i + 1] = __builtin_shuffle(row[i], row[i + 1], high);
  }
  NEOX_UNROLL for (int i = 0; i < 8; i += 4) {
    s[i] = __builtin_shuffle(t[i], t[i + 2], pair_low);
    s[i + 1] = __builtin_shuffle(t[i], t[i + 2], pair_high);
    s[i + 2] = __builtin_shuffle(t[i + 1], t[i + 3], pair_low);
    s[i + 3] = __builtin_shuffle(t[i + 1], t[i + 3], pair_high);
  }
  NEOX_UNROLL for (int i = 0; i < 4; i++) {
    *reinterpret_cast<EightUnaligned*>(to + i * ld_to) = __builtin_shuffle(s[i], s[i + 4], left);
    *reinterpret_cast<EightUnaligned*>(to + (i + 4) * ld_to) = __builtin_shuffle(s[i], s[i + 4], right);
  }
}
inline Eight load8(const float* from) { return *reinterpret_cast<const EightUnaligned*>(from); }
inline Eight load8(const bf16* from) {
  typedef uint16_t H __attribute__((vector_size(16), aligned(2), may_alias));
  typedef uint32_t W __attribute__((vector_size(32)));
  return reinterpret_cast<Eight>(__builtin_convertvector(*reinterpret_cast<const H*>(from), W) << 16);
}
#endif

// to[k * ld_to + n] = from[n * ld + k], for n < rows and k < columns.
template <class To, class From>
inline void transpose(To* to, int64_t ld_to, const From* from, int64_t ld, int64_t rows, int64_t columns) {
  int64_t n = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(To) == 4) {
    for (; n + 8 <= rows; n += 8) {
      int64_t k = 0;
      for (; k + 8 <= columns; k += 8) {
        Eight row[8];
        NEOX_UNROLL for (int i = 0; i < 8; i++) row[i] = load8(from + (n + i) * ld + k);
        transpose8(to + k * ld_to + n, ld_to, row);
      }
      for (; k < columns; k++)
        for (int i = 0; i < 8; i++) to[k * ld_to + n + i] = widen(from[(n + i) * ld + k]);
    }
  }
#endif
  for (; n < rows; n++)
    for (int64_t k = 0; k < columns; k++) to[k * ld_to + n] = widen(from[n * ld + k]);
}

// ---- the innermost products

// c[M][NV vectors] += sum over k of a[i][k] b[k], or = where c is fresh; a(i, k) lies at a[i * row + k * step].
template <class T, int M>
inline void tile(const T* a, int64_t row, int64_t step, const T* b, int64_t K, T* c, int64_t ldc, bool fresh) {
  Vec<T> sum[M][NV];
  if (fresh) {
    NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < NV; j++) sum[i][j] = Vec<T>{};
  } else {
    NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < NV; j++) sum[i][j] = load(c + i * ldc + j * LANES<T>);
  }
  const T* at[M];
  NEOX_UNROLL for (int i = 0; i < M; i++) at[i] = a + i * row;
  if (step == 1) {
    for (int64_t k = 0; k < K; k++, b += NV * LANES<T>) {
      Vec<T> right[NV];
      NEOX_UNROLL for (int j = 0; j < NV; j++) right[j] = load(b + j * LANES<T>);
      NEOX_UNROLL for (int i = 0; i < M; i++) {
        const Vec<T> left = all(at[i][k]);
        NEOX_UNROLL for (int j = 0; j < NV; j++) sum[i][j] += left * right[j];
      }
    }
  } else {  // a packed panel: row == 1
    for (int64_t k = 0; k < K; k++, b += NV * LANES<T>, a += step) {
      Vec<T> right[NV];
      NEOX_UNROLL for (int j = 0; j < NV; j++) right[j] = load(b + j * LANES<T>);
      NEOX_UNROLL for (int i = 0; i < M; i++) {
        const Vec<T> left = all(a[i]);
        NEOX_UNROLL for (int j = 0; j < NV; j++) sum[i][j] += left * right[j];
      }
    }
  }
  NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < NV; j++) store(c + i * ldc + j * LANES<T>, sum[i][j]);
}

template <class T, int M = MR>
inline void tile_of(int64_t m, const T* a, int64_t row, int64_t step, const T* b, int64_t K, T* c, int64_t ldc, bool fresh) {
  if (m >= M) {
    tile<T, M>(a, row, step, b, K, c, ldc, fresh);
  } else if constexpr (M > 1) {
    tile_of<T, M - 1>(m, a, row, step, b, K, c, ldc, fresh);
  }
}

// sum[i][j] over k of a[i][k] b[j][k]: both are contiguous along K, and nothing is packed. `fresh` as above.
template <class P, int M, int N, class A, class B>
inline void dots_tile(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t K, SumOf<B>* c, int64_t ldc, bool fresh) {
  typename P::Lanes sum[M][N] = {};
  for (int64_t k = 0; k < K; k += P::STEP) {
    const int64_t left = K - k;
    typename P::Factors right[N];
    NEOX_UNROLL for (int j = 0; j < N; j++) right[j] = P::factors(b + j * ldb + k, left);
    NEOX_UNROLL for (int i = 0; i < M; i++) {
      const typename P::Factors row = P::factors(a + i * lda + k, left);
      NEOX_UNROLL for (int j = 0; j < N; j++) P::accumulate(sum[i][j], row, right[j]);
    }
  }
  NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < N; j++) {
    const auto total = P::total(sum[i][j]);
    c[i * ldc + j] = fresh ? total : c[i * ldc + j] + total;
  }
}
template <class P, int N, int M = 4, class A, class B>
inline void dots_of(int64_t m, const A* a, int64_t lda, const B* b, int64_t ldb, int64_t K, SumOf<B>* c, int64_t ldc, bool fresh) {
  if (m >= M) {
    dots_tile<P, M, N>(a, lda, b, ldb, K, c, ldc, fresh);
  } else if constexpr (M > 1) {
    dots_of<P, N, M - 1>(m, a, lda, b, ldb, K, c, ldc, fresh);
  }
}
// Asks for memory that is needed soon: part `i` of `parts`.
template <class T>
inline void ask_for(const T* from, int64_t n, int64_t i, int64_t parts) {
  constexpr int64_t LINE = 64 / sizeof(T);
  const int64_t each = ((n + LINE - 1) / LINE + parts - 1) / parts * LINE;
  for (int64_t k = i * each; k < std::min(n, (i + 1) * each); k += LINE) __builtin_prefetch(from + k, 0, 2);
}

// c[m, n] = a[m, K] b[n, K]^T where a has so few rows that packing b costs more than the product.
template <class P, class A, class B>
inline void dots(const A* a, int64_t lda, int64_t m, const B* b, int64_t ldb, int64_t K, int64_t n, SumOf<B>* c, int64_t ldc) {
  constexpr int64_t DEPTH = 1024;
  for (int64_t k = 0; k < K; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, K - k);
    for (int64_t j = 0; j < n;) {
      const bool three = n - j >= 3;
      for (int64_t i = 0; i < m; i += 4) {
        for (int64_t next = j + 3; next < std::min(n, j + 6); next++) ask_for(b + next * ldb + k, depth, i / 4, (m + 3) / 4);
        if (three) dots_of<P, 3>(m - i, a + i * lda + k, lda, b + j * ldb + k, ldb, depth, c + i * ldc + j, ldc, k == 0);
        else dots_of<P, 1>(m - i, a + i * lda + k, lda, b + j * ldb + k, ldb, depth, c + i * ldc + j, ldc, k == 0);
      }
      j += three ? 3 : 1;
    }
  }
}

// Rows of a tile: as many tiles as MR needs, all of about the same height. A tile of one or two rows waits for its loads.
inline int64_t even_rows(int64_t m) {
  const int64_t tiles = std::max<int64_t>(1, (m + MR - 1) / MR);
  return std::max<int64_t>(1, (m + tiles - 1) / tiles);
}

constexpr int64_t THIN_DEPTH = 8;
// The tile of `thin`: K is at most THIN_DEPTH, row k of b lies at b + k * ldb, in any format.
template <class T, int M, class From>
inline void thin_tile(const T* a, int64_t lda, const From* b, int64_t ldb, int64_t K, T* c, int64_t ldc, bool fresh) {
  Vec<T> sum[M][NV];
  if (fresh) {
    NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < NV; j++) sum[i][j] = Vec<T>{};
  } else {
    NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < NV; j++) sum[i][j] = load(c + i * ldc + j * LANES<T>);
  }
  const auto step = [&](int64_t k) {
    Vec<T> right[NV];
    NEOX_UNROLL for (int j = 0; j < NV; j++) right[j] = load_wide(b + k * ldb + j * LANES<T>);
    NEOX_UNROLL for (int i = 0; i < M; i++) {
      const Vec<T> left = all(a[i * lda + k]);
      NEOX_UNROLL for (int j = 0; j < NV; j++) sum[i][j] += left * right[j];
    }
  };
  if (K == THIN_DEPTH) {
    NEOX_UNROLL for (int64_t k = 0; k < THIN_DEPTH; k++) step(k);
  } else {
    for (int64_t k = 0; k < K; k++) step(k);
  }
  NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < NV; j++) store(c + i * ldc + j * LANES<T>, sum[i][j]);
}
template <class T, int M = MR, class From>
inline void thin_tile_of(int64_t m, const T* a, int64_t lda, const From* b, int64_t ldb, int64_t K, T* c, int64_t ldc, bool fresh) {
  if (m >= M) {
    thin_tile<T, M>(a, lda, b, ldb, K, c, ldc, fresh);
  } else if constexpr (M > 1) {
    thin_tile_of<T, M - 1>(m, a, lda, b, ldb, K, c, ldc, fresh);
  }
}

constexpr int64_t TURNED_DEPTH = 1024;  // rows of a turned operand that are packed at a time
constexpr int64_t K_BLOCK = 256;  // a panel of b of this depth stays in the first cache

// ---- float and double, and bf16 widened to float

template <class StorageT>
struct Wide {
  using Storage = StorageT;
  using Sum = SumOf<Storage>;
  using Left = Sum;
  using Right = Sum;
  static constexpr int64_t NR = NV * LANES<Sum>;
  static constexpr int64_t K_ALIGN = 1;
  static constexpr int64_t FEW_ROWS = 24;  // up to so many, packing a weight costs more than it saves
  static constexpr int64_t THIN_ROWS = FEW_ROWS, THIN_COLUMNS = INT64_MAX;  // up to so many in one call of `thin`
  static int64_t right_size(int64_t K, int64_t n) { return round_up(n, NR) * K; }
  static int64_t turned_size(int64_t K, int64_t m) { return round_up(m, MR) * K; }

  // b[K, n] = from[n, K]^T
  template <class From>
  static void pack_transposed(Right* to, const From* from, int64_t ld, int64_t K, int64_t n) {
    for (int64_t j = 0; j < n; j += NR, to += K * NR) {
      const int64_t width = std::min(NR, n - j);
      transpose(to, NR, from + j * ld, ld, width, K);
      if (width < NR)
        for (int64_t k = 0; k < K; k++) clear(to + k * NR + width, NR - width);
    }
  }
  // b[K, n] = from[K, n].
  template <class From>
  static void pack(Right* to, const From* from, int64_t ld, int64_t K, int64_t n) {
    for (int64_t k0 = 0; k0 < K; k0 += PACK_ROWS) {
      const int64_t k1 = std::min(K, k0 + PACK_ROWS);
      for (int64_t j = 0; j < n; j += NR) {
        const int64_t width = std::min(NR, n - j);
        for (int64_t k = k0; k < k1; k++) {
          Right* row = to + j * K + k * NR;
          const From* source = from + k * ld + j;
          if (width == NR) {
            NEOX_UNROLL for (int v = 0; v < NV; v++) store(row + v * LANES<Sum>, load_wide(source + v * LANES<Sum>));
          } else {
            for (int64_t i = 0; i < NR; i++) row[i] = i < width ? widen(source[i]) : Right(0);
          }
        }
      }
    }
  }
  // a[m, K] = from[K, m]^T, in panels of MR rows: the operand of `turned`.
  template <class From>
  static void pack_turned(Left* to, const From* from, int64_t ld, int64_t K, int64_t m) {
    for (int64_t k0 = 0; k0 < K; k0 += PACK_ROWS) {
      const int64_t k1 = std::min(K, k0 + PACK_ROWS);
      for (int64_t i = 0; i < m; i += MR) {
        const int64_t width = std::min<int64_t>(MR, m - i);
        for (int64_t k = k0; k < k1; k++) {
          Left* row = to + i * K + k * MR;
          const From* source = from + k * ld + i;
          if (width == MR) {
            if constexpr (std::is_same<From, Left>::value) std::memcpy(row, source, MR * sizeof(Left));
            else NEOX_UNROLL for (int r = 0; r < MR; r++) row[r] = widen(source[r]);
          } else {
            for (int64_t r = 0; r < MR; r++) row[r] = r < width ? widen(source[r]) : Left(0);
          }
        }
      }
    }
  }
  // For `dots`.
  using Lanes = Vec<Sum>;
  using Factors = Vec<Sum>;
  static constexpr int64_t STEP = LANES<Sum>;
  template <class From>
  static Factors factors(const From* from, int64_t left) {
    if (left >= STEP) return load_wide(from);
    Factors some{};
    for (int64_t i = 0; i < left; i++) some[i] = widen(from[i]);
    return some;
  }
  static void accumulate(Lanes& sum, Factors a, Factors b) { sum += a * b; }
  static Sum total(const Lanes& sum) {
    Sum all = 0;
    for (int64_t i = 0; i < STEP; i++) all += sum[i];
    return all;
  }
  // c += a b, or c = a b where it is fresh (and K is not 0).
  static void product(const Left* a, int64_t lda, int64_t m, const Right* b, int64_t K, int64_t n, Sum* c, int64_t ldc, bool fresh) {
    const int64_t even = even_rows(m);
    for (int64_t k = 0; k < K; k += K_BLOCK) {
      const int64_t depth = std::min(K_BLOCK, K - k);
      for (int64_t j = 0; j < n; j += NR)
        for (int64_t i = 0; i < m; i += even) {
          if (j == 0)
            for (int64_t r = i + even; r < std::min(m, i + 2 * even); r++) ask_for(a + r * lda + k, depth, 0, 1);
          tile_of<Sum>(std::min(even, m - i), a + i * lda + k, lda, 1, b + j * K + k * NR, depth, c + i * ldc + j, ldc, fresh && k == 0);
        }
    }
  }
  // c = a b of few rows: b is not packed. THIN_DEPTH of its rows at a time are read, and pass all columns; the next ones are asked for meanwhile.
  template <class From>
  static void thin(const Left* a, int64_t lda, int64_t m, const From* b, int64_t ldb, int64_t K, int64_t n, Sum* c, int64_t ldc) {
    const int64_t even = even_rows(m), whole = n / NR * NR;
    for (int64_t k = 0; k < K; k += THIN_DEPTH) {
      const int64_t depth = std::min(THIN_DEPTH, K - k);
      const From* next = k + THIN_DEPTH < K ? b + (k + THIN_DEPTH) * ldb : b;
      for (int64_t j = 0; j < whole; j += NR) {
        for (int64_t d = 0; d < depth; d++) ask_for(next + d * ldb + j, NR, 0, 1);
        for (int64_t i = 0; i < m; i += even)
          thin_tile_of<Sum>(std::min(even, m - i), a + i * lda + k, lda, b + k * ldb + j, ldb, depth, c + i * ldc + j, ldc, k == 0);
      }
      if (whole == n) continue;
      Sum last[THIN_DEPTH * NR];
      pack(last, b + k * ldb + whole, ldb, depth, n - whole);
      for (int64_t i = 0; i < m; i += even)
        thin_tile_of<Sum>(std::min(even, m - i), a + i * lda + k, lda, last, NR, depth, c + i * ldc + whole, ldc, k == 0);
    }
  }
  // The same with a from `pack_turned`: `a` holds rows k0 to k0 + K of a panel of `deep` rows. c is often a gradient in memory: a part of it is finished
  // before the next one is begun, and its lines are asked for before they are written.
  static void turned(const Left* a, int64_t m, const Right* b, int64_t deep, int64_t k0, int64_t K, int64_t n, Sum* c, int64_t ldc, bool fresh) {
    constexpr int64_t PART = 8 * NR;
    for (int64_t part = 0; part < n; part += PART)
      for (int64_t k = 0; k < K; k += K_BLOCK) {
        const int64_t depth = std::min(K_BLOCK, K - k);
        for (int64_t j = part; j < std::min(n, part + PART); j += NR) {
          if (k == 0 && j + NR < n)
            for (int64_t i = 0; i < m; i++) __builtin_prefetch(c + i * ldc + j + NR, 1);
          const Right* panel = b + j * deep + (k0 + k) * NR;
          for (int64_t i = 0; i < m; i += MR) {
            if (j + NR < n) ask_for(panel + deep * NR, depth * NR, i / MR, (m + MR - 1) / MR);
            tile_of<Sum>(m - i, a + i * K + k * MR, 1, MR, panel, depth, c + i * ldc + j, ldc, fresh && k == 0);
          }
        }
      }
  }
  // out = a b in the storage format, where K is at most ONCE: every tile is finished in one pass. `far`: past the caches.
  static constexpr int64_t ONCE = K_BLOCK;
  static void turned_once(const Left* a, int64_t m, const Right* b, int64_t K, int64_t n, Storage* out, int64_t ldo, bool far) {
    alignas(64) Sum sums[MR * NR];
    for (int64_t j = 0; j < n; j += NR)
      for (int64_t i = 0; i < m; i += MR) {
        tile_of<Sum>(m - i, a + i * K, 1, MR, b + j * K, K, sums, NR, true);
        put_rows(out + i * ldo + j, ldo, sums, NR, std::min<int64_t>(MR, m - i), std::min(NR, n - j), far);
      }
  }
};

#ifdef NEOX_DOT
// ---- bf16 in pairs

struct Dot {
  using Storage = bf16;
  using Sum = float;
  using Left = bf16;
  using Right = bf16;
  static constexpr int64_t NR = 32;
  static constexpr int64_t K_ALIGN = NEOX_DOT == 2 ? 32 : 2;  // a tile of AMX, or a pair
  static constexpr int64_t FEW_ROWS = 12;
  static constexpr int64_t THIN_ROWS = NEOX_DOT == 2 ? 0 : 24, THIN_COLUMNS = 256;
  static int64_t right_size(int64_t K, int64_t n) { return round_up(n, NR) * round_up(K, K_ALIGN); }
  static int64_t turned_size(int64_t K, int64_t m) { return m * round_up(K, K_ALIGN); }

  // Pairs along K lie side by side in a row of `from`: a transposition of 32-bit words.
  template <class From>
  static void pack_transposed(Right* to, const From* from, int64_t ld, int64_t K, int64_t n) {
    const int64_t deep = round_up(K, K_ALIGN);
    for (int64_t j = 0; j < n; j += NR, to += deep * NR) {
      const int64_t width = std::min(NR, n - j);
      if (width < NR || deep > K) clear(to, deep * NR);
      transpose_pairs(to, from + j * ld, ld, width, K);
    }
  }
  static void transpose_pairs(Right* to, const bf16* from, int64_t ld, int64_t rows, int64_t K) {
    const int64_t pairs = K / 2;
    int64_t n = 0;
    for (; n + 8 <= rows; n += 8) {
      int64_t p = 0;
      for (; p + 8 <= pairs; p += 8) {
        Eight row[8];
        NEOX_UNROLL for (int i = 0; i < 8; i++) row[i] = *reinterpret_cast<const EightUnaligned*>(from + (n + i) * ld + 2 * p);
        transpose8(reinterpret_cast<float*>(to) + p * NR + n, NR, row);
      }
      for (; p < pairs; p++)
        for (int i = 0; i < 8; i++) std::memcpy(to + (p * NR + n + i) * 2, from + (n + i) * ld + 2 * p, 4);
    }
    for (; n < rows; n++)
      for (int64_t p = 0; p < pairs; p++) std::memcpy(to + (p * NR + n) * 2, from + n * ld + 2 * p, 4);
    if (K % 2)
      for (int64_t i = 0; i < rows; i++) to[(pairs * NR + i) * 2] = from[i * ld + K - 1];
  }
  // Two rows of `from` are interleaved.
  template <class From>
  static void pack(Right* to, const From* from, int64_t ld, int64_t K, int64_t n) {
    const int64_t deep = round_up(K, K_ALIGN);
    for (int64_t j = 0; j < n; j += NR)
      if (n - j < NR || deep > K) clear(to + j * deep, deep * NR);
    for (int64_t k0 = 0; k0 < K; k0 += PACK_ROWS)
      for (int64_t j = 0; j < n; j += NR) {
        const int64_t width = std::min(NR, n - j), k1 = std::min(K, k0 + PACK_ROWS);
        Right* panel = to + j * deep;
        int64_t k = k0;
        for (; k + 2 <= k1; k += 2) interleave(panel + k * NR, from + k * ld + j, from + (k + 1) * ld + j, width);
        if (k < k1)
          for (int64_t i = 0; i < width; i++) panel[k * NR + 2 * i] = from[k * ld + j + i];
      }
  }
  static void interleave(Right* to, const bf16* first, const bf16* second, int64_t n) {
    typedef uint16_t Row __attribute__((vector_size(32), aligned(2), may_alias));
    typedef uint16_t Index __attribute__((vector_size(32)));
    const Index low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Index high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const Row a = *reinterpret_cast<const Row*>(first + i), b = *reinterpret_cast<const Row*>(second + i);
      *reinterpret_cast<Row*>(to + 2 * i) = __builtin_shuffle(a, b, low);
      *reinterpret_cast<Row*>(to + 2 * i + 16) = __builtin_shuffle(a, b, high);
    }
    for (; i < n; i++) {
      to[2 * i] = first[i];
      to[2 * i + 1] = second[i];
    }
  }
  // Rows of a[m, K] = from[K, m]^T, as plain rows. Two rows of `from` are interleaved; then it is a transposition of 32-bit words.
  template <class From>
  static void pack_turned(Left* to, const From* from, int64_t ld, int64_t K, int64_t m) {
    const int64_t deep = round_up(K, K_ALIGN);
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      int64_t i = 0;
      for (; i + 8 <= m; i += 8) {
        Eight row[8];
        NEOX_UNROLL for (int p = 0; p < 8; p++) row[p] = pairs_of(from + (k + 2 * p) * ld + i, from + (k + 2 * p + 1) * ld + i);
        transpose8(reinterpret_cast<float*>(to + i * deep + k), deep / 2, row);
      }
      for (; i < m; i++)
        for (int64_t r = k; r < k + 16; r++) to[i * deep + r] = from[r * ld + i];
    }
    for (; k < deep; k++)
      for (int64_t i = 0; i < m; i++) to[i * deep + k] = k < K ? from[k * ld + i] : bf16{0};
  }
  static Eight pairs_of(const bf16* first, const bf16* second) {
    typedef uint16_t Half __attribute__((vector_size(16), aligned(2), may_alias));
    typedef uint32_t Words8 __attribute__((vector_size(32)));
    const Words8 low = __builtin_convertvector(*reinterpret_cast<const Half*>(first), Words8);
    const Words8 high = __builtin_convertvector(*reinterpret_cast<const Half*>(second), Words8);
    return reinterpret_cast<Eight>(low | high << 16);
  }
  // For `dots`.
  using Lanes = PairSums;
  using Factors = Pairs;
  static constexpr int64_t STEP = PAIRS_STEP;
  static Factors factors(const bf16* from, int64_t left) { return load_pairs(from, left); }
  static void accumulate(Lanes& sum, const Factors& a, const Factors& b) { add_pairs_of(sum, a, b); }
  static Sum total(const Lanes& sum) { return total_of(sum); }
  static void product(const Left* a, int64_t lda, int64_t m, const Right* b, int64_t K, int64_t n, Sum* c, int64_t ldc, bool fresh) {
    dot_product(a, lda, m, b, round_up(K, K_ALIGN), round_up(K, K_ALIGN), n, c, ldc, fresh);
  }
  // As Wide's: two rows of b are interleaved in registers.
  static void thin(const Left* a, int64_t lda, int64_t m, const bf16* b, int64_t ldb, int64_t K, int64_t n, Sum* c, int64_t ldc) {
    const int64_t whole = n / NR * NR, tiles = (m + DOT_ROWS - 1) / DOT_ROWS, even = (m + tiles - 1) / tiles;
    for (int64_t j = 0; j < whole; j += NR)
      for (int64_t i = 0; i < m; i += even) thin_pairs_of(std::min(even, m - i), a + i * lda, lda, b + j, ldb, K, THIN_COLUMNS, c + i * ldc + j, ldc);
    if (whole == n) return;
    Right* last = scratch<Right, 34>(right_size(K, NR));
    pack(last, b + whole, ldb, K, n - whole);
    product(a, lda, m, last, K, n - whole, c + whole, ldc, true);
  }
  // k0 is a multiple of K_ALIGN.
  static void turned(const Left* a, int64_t m, const Right* b, int64_t deep, int64_t k0, int64_t K, int64_t n, Sum* c, int64_t ldc, bool fresh) {
    const int64_t depth = round_up(K, K_ALIGN);
    dot_product(a, depth, m, b + k0 * NR, round_up(deep, K_ALIGN), depth, n, c, ldc, fresh);
  }
  // As Wide's. AMX would fill few rows up to 32.
  static constexpr int64_t ONCE = NEOX_DOT == 2 ? 16 : 512;
  static void turned_once(const Left* a, int64_t m, const Right* b, int64_t K, int64_t n, Storage* out, int64_t ldo, bool far) {
    const int64_t deep = round_up(K, K_ALIGN), pairs = round_up(K, 2);
    alignas(64) Sum sums[DOT_ROWS * NR];
    for (int64_t j = 0; j < n; j += NR)
      for (int64_t i = 0; i < m; i += DOT_ROWS) {
        dot_tile_of(m - i, a + i * deep, deep, b + j * deep, pairs, sums, NR, true);
        put_rows(out + i * ldo + j, ldo, sums, NR, std::min<int64_t>(DOT_ROWS, m - i), std::min(NR, n - j), far);
      }
  }
};
#endif

template <class S>
struct Of {
  using type = S;
};

// Calls f with the storage format. Sets with 16-bit products are compiled for bf16 alone: the other formats are those of the set before them.
template <class F>
inline void for_each_dtype([[maybe_unused]] Dtype dtype, F f) {
#ifndef NEOX_DOT
  if (dtype == Dtype::float32) return f(Of<float>{});
  if (dtype == Dtype::float64) return f(Of<double>{});
#endif
  f(Of<bf16>{});
}

// The product that serves a storage format here.
template <class Storage>
struct ProductFor {
  using type = Wide<Storage>;
};
#ifdef NEOX_DOT
template <>
struct ProductFor<bf16> {
  using type = Dot;
};
#endif

}  // namespace NEOX_ISA
