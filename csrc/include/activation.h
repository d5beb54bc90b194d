// Activations and their derivatives: float in whole vectors, double one number at a time. The names and order are those of activations.h.
#pragma once

#include "numbers.h"

namespace NEOX_ISA {

// ---- elementary functions of float vectors

// e^x: 2^n times a polynomial on [-ln2/2, ln2/2]. Relative error below 2e-7; 0 below -87.3, infinity above 88.7, NaN for NaN.
inline Vec<float> exp_(Vec<float> x) {
  const Vec<float> log2e = all(1.44269504088896341f), high = all(88.72283f), low = all(-87.33654f);
  const Vec<float> clipped = x > high ? high : (x < low ? low : x);
  const Vec<float> shift = all(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec<float> n = (clipped * log2e + shift) - shift;
  const Vec<float> r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // Two factors of 2^(n/2): n = 128 does not fit into one exponent.
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
  const Vec<float> first = reinterpret_cast<Vec<float>>((half + 127) << 23), second = reinterpret_cast<Vec<float>>((whole - half + 127) << 23);
  const Vec<float> y = p * first * second;
  const Vec<float> infinite = all(__builtin_inff());
  const Vec<float> bounded = x > high ? infinite : (x < low ? all(0.f) : y);
  return x != x ? x : bounded;
}

// erf(x) = 1 - (a1 t + ... + a5 t^5) e^(-x^2), t = 1/(1 + p|x|) (Abramowitz and Stegun, 7.1.26): absolute error below 2e-7; a series near 0.
inline Vec<float> erf_(Vec<float> x) {
  const Vec<float> size = x < 0 ? -x : x;
  const Vec<float> t = 1.f / (1.f + 0.3275911f * size);
  Vec<float> p = all(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec<float> y = 1.f - p * t * exp_(-(size * size));
  const Vec<float> far = x < 0 ? -y : y;
  const Vec<float> s = x * x;
  const Vec<float> near = x * (1.12837916709551f + s * (-0.376126389031838f + s * (0.112837916709551f - s * 0.0268661706451313f)));
  return size < 0.25f ? near : far;
}

inline double exp_(double x) { return std::exp(x); }
inline double erf_(double x) { return std::erf(x); }

template <class X>
inline X sigmoid_(X x) { return 1 / (1 + exp_(-x)); }
// 1 - 2/(e^2x + 1): both ends are right, also where e^2x overflows.
template <class X>
inline X tanh_(X x) { return 1 - 2 / (exp_(2 * x) + 1); }
template <class X>
inline X abs_(X x) { return x < 0 ? -x : x; }

// ---- activations: value(x), and slope(x) = derivative

template <class T>
struct Constants {
  static constexpr T sqrt_half = T(0.70710678118654752440), half_normal = T(0.39894228040143267794), tanh_scale = T(0.79788456080286535588),
                     tanh_cube = T(0.044715);
};

template <class X, class T>
struct Identity {
  static X value(X x) { return x; }
  static X slope(X) { return X{} + 1; }
};
template <class X, class T>
struct Gelu {
  static X value(X x) { return T(0.5) * x * (1 + erf_(x * Constants<T>::sqrt_half)); }
  static X slope(X x) {
    return T(0.5) * (1 + erf_(x * Constants<T>::sqrt_half)) + x * (Constants<T>::half_normal * exp_(T(-0.5) * x * x));
  }
};
template <class X, class T>
struct GeluTanh {
  static X inner(X x) { return Constants<T>::tanh_scale * (x + Constants<T>::tanh_cube * x * x * x); }
  static X value(X x) { return T(0.5) * x * (1 + tanh_(inner(x))); }
  static X slope(X x) {
    const X t = tanh_(inner(x));
    const X rise = Constants<T>::tanh_scale * (1 + 3 * Constants<T>::tanh_cube * x * x);
    return T(0.5) * (1 + t) + T(0.5) * x * (1 - t * t) * rise;
  }
};
template <class X, class T>
struct Relu {
  static X value(X x) { return x < 0 ? X{} : x; }
  static X slope(X x) { return x > 0 ? X{} + 1 : X{}; }
};
template <class X, class T>
struct Silu {
  static X value(X x) { return x * sigmoid_(x); }
  static X slope(X x) {
    const X s = sigmoid_(x);
    return s * (1 + x * (1 - s));
  }
};
template <class X, class T>
struct Sigmoid {
  static X value(X x) { return sigmoid_(x); }
  static X slope(X x) {
    const X s = sigmoid_(x);
    return s * (1 - s);
  }
};
// x tanh(log(1 + e^x)), where tanh(log(1 + n)) = (n^2 + 2n) / (n^2 + 2n + 2)
template <class X, class T>
struct Mish {
  static X inner(X x) {
    const X n = exp_(x), w = n * (n + 2);
    return x > 20 ? X{} + 1 : w / (w + 2);
  }
  static X value(X x) { return x * inner(x); }
  static X slope(X x) {
    const X t = inner(x);
    return t + x * (1 - t * t) * sigmoid_(x);
  }
};
template <class X, class T>
struct Softsign {
  static X value(X x) { return x / (1 + abs_(x)); }
  static X slope(X x) {
    const X below = 1 + abs_(x);
    return 1 / (below * below);
  }
};

// A number type's way through a row: vectors of it, then single numbers (for float: a vector of which one place counts).
template <class T>
struct Stride;
template <>
struct Stride<float> {
  using X = Vec<float>;
  static constexpr int width = LANES<float>;
};
template <>
struct Stride<double> {
  using X = double;
  static constexpr int width = 1;
};

template <class S>
inline auto take(const S* from, int64_t left) {
  using T = SumOf<S>;
  if constexpr (Stride<T>::width == 1) {
    return widen(*from);
  } else {
    if (left >= Stride<T>::width) return load_wide(from);
    Vec<T> v{};
    for (int64_t i = 0; i < left; i++) v[i] = widen(from[i]);
    return v;
  }
}
template <class S, class X>
inline void put(S* to, X v, int64_t left) {
  using T = SumOf<S>;
  if constexpr (Stride<T>::width == 1) {
    *to = v;
  } else {
    if (left >= Stride<T>::width) {
      store_narrow(to, v);
    } else {
      for (int64_t i = 0; i < left; i++) to[i] = convert<S>(v[i]);
    }
  }
}

// Calls f with the activation's class.
template <class T, class F>
inline void with_activation(int activation, F f) {
  using X = typename Stride<T>::X;
  switch (activation) {
    case 0: return f(Identity<X, T>{});
    case 1: return f(Gelu<X, T>{});
    case 2: return f(GeluTanh<X, T>{});
    case 3: return f(Relu<X, T>{});
    case 4: return f(Silu<X, T>{});
    case 5: return f(Sigmoid<X, T>{});
    case 6: return f(Mish<X, T>{});
    default: return f(Softsign<X, T>{});
  }
}

}  // namespace NEOX_ISA
