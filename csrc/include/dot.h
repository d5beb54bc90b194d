// c += a b of bf16 pairs with float sums: AMX tiles (NEOX_DOT == 2), AVX512-bf16 (NEOX_DOT == 1), or both instructions written out in C++
// (NEOX_EMULATED), which is how machines without them test what surrounds them.
#pragma once

#include <algorithm>

#include "numbers.h"
#ifndef NEOX_EMULATED
#include <immintrin.h>
#endif

namespace NEOX_ISA {

constexpr int64_t DOT_COLUMNS = 32;  // of a panel of b: [K / 2][32][2]

// ---- products of two rows along K, 32 numbers at a time

constexpr int64_t PAIRS_STEP = 32;
#ifdef NEOX_EMULATED
struct PairSums {
  float at[PAIRS_STEP / 2];
};
struct Pairs {
  bf16 at[PAIRS_STEP];
};
inline Pairs load_pairs(const bf16* from, int64_t left) {
  Pairs p{};
  std::memcpy(p.at, from, std::min(left, PAIRS_STEP) * sizeof(bf16));
  return p;
}
inline void add_pairs_of(PairSums& sum, const Pairs& a, const Pairs& b) {
  for (int n = 0; n < PAIRS_STEP / 2; n++) sum.at[n] += widen(a.at[2 * n]) * widen(b.at[2 * n]) + widen(a.at[2 * n + 1]) * widen(b.at[2 * n + 1]);
}
inline float total_of(const PairSums& sum) {
  float total = 0;
  for (float each : sum.at) total += each;
  return total;
}
#else
typedef __m512 PairSums;
typedef __m512i Pairs;
// Numbers beyond `left` are not read.
inline Pairs load_pairs(const bf16* from, int64_t left) {
  return left >= PAIRS_STEP ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << left) - 1), from);
}
inline void add_pairs_of(PairSums& sum, Pairs a, Pairs b) { sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
inline float total_of(PairSums sum) { return _mm512_reduce_add_ps(sum); }
#endif

// ---- AVX512-bf16: tiles of sums in registers

#ifdef NEOX_EMULATED
constexpr int DOT_ROWS = 4, DOT_LANES = 16;
struct Sums {
  float at[DOT_LANES];
};
inline Sums load_sums(const float* from) {
  Sums s;
  std::memcpy(s.at, from, sizeof s.at);
  return s;
}
inline void store_sums(float* to, const Sums& s) { std::memcpy(to, s.at, sizeof s.at); }
// Two rows of DOT_COLUMNS numbers, interleaved as a panel has them.
struct TwoRows {
  bf16 low[2 * DOT_LANES], high[2 * DOT_LANES];
};
inline TwoRows two_rows(const bf16* first, const bf16* second) {
  TwoRows rows;
  for (int n = 0; n < DOT_LANES; n++) {
    rows.low[2 * n] = first[n], rows.low[2 * n + 1] = second[n];
    rows.high[2 * n] = first[DOT_LANES + n], rows.high[2 * n + 1] = second[DOT_LANES + n];
  }
  return rows;
}
// VDPBF16PS with one pair of a for all lanes.
inline void add_pairs(Sums& sum, const bf16* a, const bf16* b) {
  for (int n = 0; n < DOT_LANES; n++) sum.at[n] += widen(a[0]) * widen(b[2 * n]) + widen(a[1]) * widen(b[2 * n + 1]);
}
#else
constexpr int DOT_ROWS = 12, DOT_LANES = 16;
typedef __m512 Sums;
inline Sums load_sums(const float* from) { return _mm512_loadu_ps(from); }
inline void store_sums(float* to, Sums s) { _mm512_storeu_ps(to, s); }
inline void add_pairs(Sums& sum, const bf16* a, __m512i b) {
  int32_t pair;
  std::memcpy(&pair, a, 4);
  sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
inline void add_pairs(Sums& sum, const bf16* a, const bf16* b) { add_pairs(sum, a, _mm512_loadu_si512(b)); }
struct TwoRows {
  __m512i low, high;
};
inline TwoRows two_rows(const bf16* first, const bf16* second) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  const Words low = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  return {_mm512_permutex2var_epi16(a, (__m512i)low, b), _mm512_permutex2var_epi16(a, (__m512i)(low + 16), b)};
}
#endif

template <int M>
inline void dot_tile(const bf16* a, int64_t lda, const bf16* b, int64_t K, float* c, int64_t ldc, bool fresh) {
  Sums sum[M][2];
  if (fresh) {
    NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < 2; j++) sum[i][j] = Sums{};
  } else {
    NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < 2; j++) sum[i][j] = load_sums(c + i * ldc + j * DOT_LANES);
  }
  for (int64_t k = 0; k < K; k += 2, b += 2 * DOT_COLUMNS)
    NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < 2; j++) add_pairs(sum[i][j], a + i * lda + k, b + j * 2 * DOT_LANES);
  NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < 2; j++) store_sums(c + i * ldc + j * DOT_LANES, sum[i][j]);
}
template <int M = DOT_ROWS>
inline void dot_tile_of(int64_t m, const bf16* a, int64_t lda, const bf16* b, int64_t K, float* c, int64_t ldc, bool fresh) {
  if (m >= M) {
    dot_tile<M>(a, lda, b, K, c, ldc, fresh);
  } else if constexpr (M > 1) {
    dot_tile_of<M - 1>(m, a, lda, b, K, c, ldc, fresh);
  }
}

// The tile of few rows of a with K rows of b as they lie in memory, `ldb` numbers apart. The columns `ahead` of these are asked for.
template <int M>
inline void thin_pairs(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t K, int64_t ahead, float* c, int64_t ldc) {
  static constexpr bf16 NOTHING[DOT_COLUMNS] = {};
  Sums sum[M][2];
  NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < 2; j++) sum[i][j] = Sums{};
  for (int64_t k = 0; k < K; k += 2) {
    const bf16 *first = b + k * ldb, *second = k + 1 < K ? first + ldb : NOTHING;
    __builtin_prefetch(first + ahead, 0, 2);
    __builtin_prefetch(first + ldb + ahead, 0, 2);
    const TwoRows rows = two_rows(first, second);
    NEOX_UNROLL for (int i = 0; i < M; i++) add_pairs(sum[i][0], a + i * lda + k, rows.low), add_pairs(sum[i][1], a + i * lda + k, rows.high);
  }
  NEOX_UNROLL for (int i = 0; i < M; i++) NEOX_UNROLL for (int j = 0; j < 2; j++) store_sums(c + i * ldc + j * DOT_LANES, sum[i][j]);
}
template <int M = DOT_ROWS>
inline void thin_pairs_of(int64_t m, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t K, int64_t ahead, float* c, int64_t ldc) {
  if (m >= M) {
    thin_pairs<M>(a, lda, b, ldb, K, ahead, c, ldc);
  } else if constexpr (M > 1) {
    thin_pairs_of<M - 1>(m, a, lda, b, ldb, K, ahead, c, ldc);
  }
}

// ---- whole products

#if NEOX_DOT == 2

// Rows and bytes of the eight tiles, as LDTILECFG reads them (Intel's instruction set reference, "AMX").
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums (two of a's strips by two of b's); 4 and 5: a; 6 and 7: b.
inline TileConfig tiles_for(int first, int second) {
  TileConfig config;
  for (int t = 0; t < 8; t++) {
    config.row_bytes[t] = 64;
    config.rows[t] = uint8_t(t == 6 || t == 7 ? 16 : (t == 0 || t == 1 || t == 4 ? first : second));
  }
  return config;
}

#ifdef NEOX_EMULATED
struct EmulatedTiles {
  TileConfig config;
  alignas(64) uint8_t data[8][16][64];
};
inline EmulatedTiles& emulated() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}
inline void set_tiles(const TileConfig& config) {
  emulated().config = config;
  std::memset(emulated().data, 0xff, sizeof emulated().data);  // NaN: a tile that is read before it is loaded shows
}
inline void release_tiles() {}
template <int T>
inline void zero_tile() {
  std::memset(emulated().data[T], 0, sizeof emulated().data[T]);
}
template <int T>
inline void load_tile(const void* from, int64_t stride) {
  std::memset(emulated().data[T], 0, sizeof emulated().data[T]);
  for (int r = 0; r < emulated().config.rows[T]; r++) std::memcpy(emulated().data[T][r], static_cast<const uint8_t*>(from) + r * stride, 64);
}
template <int T>
inline void store_tile(void* to, int64_t stride) {
  for (int r = 0; r < emulated().config.rows[T]; r++) std::memcpy(static_cast<uint8_t*>(to) + r * stride, emulated().data[T][r], 64);
}
// TDPBF16PS: c[m][n] += a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1]
template <int C, int A, int B>
inline void multiply_tiles() {
  EmulatedTiles& t = emulated();
  for (int m = 0; m < t.config.rows[C]; m++)
    for (int k = 0; k < t.config.rows[B]; k++)
      for (int n = 0; n < 16; n++) {
        bf16 a[2], b[2];
        float c;
        std::memcpy(a, t.data[A][m] + 4 * k, 4);
        std::memcpy(b, t.data[B][k] + 4 * n, 4);
        std::memcpy(&c, t.data[C][m] + 4 * n, 4);
        c += widen(a[0]) * widen(b[0]) + widen(a[1]) * widen(b[1]);
        std::memcpy(t.data[C][m] + 4 * n, &c, 4);
      }
}
#else
inline void set_tiles(const TileConfig& config) { _tile_loadconfig(&config); }
inline void release_tiles() { _tile_release(); }
// The compiler's intrinsics spell the tile's number into the instruction: it has to be a literal.
#define NEOX_EACH_TILE(T, DO) \
  if constexpr (T == 0) DO(0); \
  else if constexpr (T == 1) DO(1); \
  else if constexpr (T == 2) DO(2); \
  else if constexpr (T == 3) DO(3); \
  else if constexpr (T == 4) DO(4); \
  else if constexpr (T == 5) DO(5); \
  else if constexpr (T == 6) DO(6); \
  else DO(7);
template <int T>
inline void load_tile(const void* from, int64_t stride) {
#define NEOX_LOAD(N) _tile_loadd(N, from, stride)
  NEOX_EACH_TILE(T, NEOX_LOAD)
}
template <int T>
inline void store_tile(void* to, int64_t stride) {
#define NEOX_STORE(N) _tile_stored(N, to, stride)
  NEOX_EACH_TILE(T, NEOX_STORE)
}
template <int T>
inline void zero_tile() {
#define NEOX_ZERO(N) _tile_zero(N)
  NEOX_EACH_TILE(T, NEOX_ZERO)
}
// Sums stand in tiles 0 to 3, two rows of a (4, 5) by two columns of b (6, 7).
template <int C, int A, int B>
inline void multiply_tiles() {
  static_assert(C == (A - 4) * 2 + (B - 6));
  if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
  else if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
  else if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
  else _tile_dpbf16ps(3, 5, 7);
}
#endif

// Two strips of at most 16 rows times one panel.
template <bool TwoStrips>
inline void strips(const bf16* a, int64_t lda, int first, const bf16* b, int64_t K, float* c, int64_t ldc, bool fresh) {
  const int64_t row = ldc * 4, a_row = lda * 2;
  if (fresh) {
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (TwoStrips) {
      zero_tile<2>();
      zero_tile<3>();
    }
  } else {
    load_tile<0>(c, row);
    load_tile<1>(c + 16, row);
    if constexpr (TwoStrips) {
      load_tile<2>(c + first * ldc, row);
      load_tile<3>(c + first * ldc + 16, row);
    }
  }
  for (int64_t k = 0; k < K; k += 32, b += 32 * DOT_COLUMNS) {
    load_tile<6>(b, 4 * DOT_COLUMNS);
    load_tile<7>(b + 32, 4 * DOT_COLUMNS);
    load_tile<4>(a + k, a_row);
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    if constexpr (TwoStrips) {
      load_tile<5>(a + first * lda + k, a_row);
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(c, row);
  store_tile<1>(c + 16, row);
  if constexpr (TwoStrips) {
    store_tile<2>(c + first * ldc, row);
    store_tile<3>(c + first * ldc + 16, row);
  }
}

// K is a multiple of 32. The panels of b are `deep` rows deep.
inline void dot_product(const bf16* a, int64_t lda, int64_t m, const bf16* b, int64_t deep, int64_t K, int64_t n, float* c, int64_t ldc, bool fresh) {
  int configured = -1;
  const auto configure = [&](int first, int second) {
    if (configured != first * 32 + second) {
      const TileConfig config = tiles_for(first, second);
      set_tiles(config);
      configured = first * 32 + second;
    }
  };
  constexpr int64_t DEPTH = 512;  // a strip of this depth (32 KiB) stays in the first cache while the panels pass over it
  for (int64_t k = 0; k < K; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, K - k);
    for (int64_t i = 0; i < m; i += 32) {
      const int first = int(std::min<int64_t>(16, m - i)), second = int(std::clamp<int64_t>(m - i - 16, 0, 16));
      configure(first, second ? second : 1);
      for (int64_t j = 0; j < n; j += DOT_COLUMNS) {
        const bf16* panel = b + j * deep + k * DOT_COLUMNS;
        if (second) {
          strips<true>(a + i * lda + k, lda, first, panel, depth, c + i * ldc + j, ldc, fresh && k == 0);
        } else {
          strips<false>(a + i * lda + k, lda, first, panel, depth, c + i * ldc + j, ldc, fresh && k == 0);
        }
      }
    }
  }
  release_tiles();
}

#else  // AVX512-bf16

// K is even. The panels of b are `deep` rows deep.
inline void dot_product(const bf16* a, int64_t lda, int64_t m, const bf16* b, int64_t deep, int64_t K, int64_t n, float* c, int64_t ldc, bool fresh) {
  constexpr int64_t DEPTH = 512;
  for (int64_t k = 0; k < K; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, K - k);
    for (int64_t j = 0; j < n; j += DOT_COLUMNS)
      for (int64_t i = 0; i < m; i += DOT_ROWS)
        dot_tile_of(m - i, a + i * lda + k, lda, b + j * deep + k * DOT_COLUMNS, depth, c + i * ldc + j, ldc, fresh && k == 0);
  }
}
#endif

}  // namespace NEOX_ISA
