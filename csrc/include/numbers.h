// Number formats and vectors of one instruction set.
//
// Every cpu.cpp is compiled once for each instruction set, with NEOX_ISA as its name. All code of these headers therefore lives in the namespace
// NEOX_ISA: functions of two instruction sets must never be merged by the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef NEOX_ISA
#error "NEOX_ISA names the instruction set that this file is compiled for"
#endif

#define NEOX_UNROLL _Pragma("GCC unroll 16")

namespace NEOX_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

struct bf16 {
  uint16_t bits;
};

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t HalvesUnaligned __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

template <class T>
inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(from);
}
template <class T>
inline void store(T* to, Vec<T> v) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(to) = v;
}
template <class T>
inline Vec<T> all(T x) {
  return x - Vec<T>{};  // x - 0 is x, also for -0, and the compiler knows it
}

inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// Rounds to nearest, ties to even; NaN stays NaN.
inline bf16 narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((bits >> 16) | 0x40)};
  return bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

inline Vec<float> load_wide(const float* from) { return load(from); }
inline Vec<double> load_wide(const double* from) { return load(from); }
inline Vec<float> load_wide(const bf16* from) {
  const Halves halves = *reinterpret_cast<const HalvesUnaligned*>(from);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(halves, Words) << 16);
}

inline void store_narrow(float* to, Vec<float> v) { store(to, v); }
inline void store_narrow(double* to, Vec<double> v) { store(to, v); }
inline void store_narrow(bf16* to, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(v);  // as `narrow`, but numbers below 2^-126 become 0, as in 16-bit products
  std::memcpy(to, &rounded, sizeof rounded);
#else
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (bits >> 16) | 0x40u;
  const Words is_nan = reinterpret_cast<Words>(v != v);
  *reinterpret_cast<HalvesUnaligned*>(to) = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), Halves);
#endif
}

template <class To>
inline To convert(float x);
template <>
inline float convert<float>(float x) { return x; }
template <>
inline bf16 convert<bf16>(float x) { return narrow(x); }
template <class To>
inline To convert(double x);
template <>
inline double convert<double>(double x) { return x; }

// The type that sums are in.
template <class S>
struct Sum {
  using type = S;
};
template <>
struct Sum<bf16> {
  using type = float;
};
template <class S>
using SumOf = typename Sum<S>::type;

// to[i] = from[i], converted; whole vectors, then the rest.
template <class To, class From>
inline void copy(To* to, const From* from, int64_t n) {
  using C = SumOf<From>;
  int64_t i = 0;
  for (; i + LANES<C> <= n; i += LANES<C>) store_narrow(to + i, load_wide(from + i));
  for (; i < n; i++) to[i] = convert<To>(widen(from[i]));
}
template <class T>
inline void copy(T* to, const T* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(T));
}
// As `copy`, past the caches, for rows of a result that is too large for them: a line that is not written whole by such an instruction is read first.
// After the last row comes `streamed`.
template <class To, class From>
inline void stream(To* to, const From* from, int64_t n) {
#if defined(__AVX2__)
  constexpr int64_t LINE = 64 / sizeof(To);
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && n % LINE == 0) {
    for (int64_t i = 0; i < n; i += LINE) {
      alignas(64) To line[LINE];
      copy(line, from + i, LINE);
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), *reinterpret_cast<const __m512i*>(line));
#else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), reinterpret_cast<const __m256i*>(line)[0]);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i) + 1, reinterpret_cast<const __m256i*>(line)[1]);
#endif
    }
    return;
  }
#endif
  copy(to, from, n);
}
// A row of a result, past the caches or through them.
template <class To, class From>
inline void put_row(To* to, const From* from, int64_t n, bool far) {
  if (far) stream(to, from, n);
  else copy(to, from, n);
}
template <class To, class From>
inline void put_rows(To* to, int64_t ldt, const From* from, int64_t ldf, int64_t rows, int64_t n, bool far) {
  for (int64_t r = 0; r < rows; r++) put_row(to + r * ldt, from + r * ldf, n, far);
}
// Other threads see what was streamed.
inline void streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
template <class T>
inline void clear(T* to, int64_t n) {
  std::memset(static_cast<void*>(to), 0, n * sizeof(T));
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace NEOX_ISA
