// Activations and their derivatives: float in whole vectors, double one number at a time. The names and order are those of activations.h.
#pragma once

#include "exponential.h"

namespace NEOX_ISA {

// ---- elementary functions of float vectors

// e^x, and e^88 above 88: as good as infinity for everything below.
inline Vec<float> exp_(Vec<float> x) { return exponential(x > 88.f ? all(88.f) : x); }
inline double exp_(double x) { return std::exp(x); }

// The normal distribution up to x, and e^(-x^2 / 2), its density but for a constant.
template <class X>
struct Normal {
  X up_to, bell;
};
// erfc(z) = (a1 t + ... + a5 t^5) e^(-z^2), t = 1/(1 + p z) for z >= 0 (Abramowitz and Stegun, 7.1.26): absolute error below 2e-7. It is half of what
// lies beyond z = |x| / sqrt(2) on both sides.
inline Normal<Vec<float>> normal_(Vec<float> x) {
  const Vec<float> size = x < 0 ? -x : x, bell = exponential(x * x * -0.5f);
  const Vec<float> t = 1.f / (1.f + 0.2316418882f * size);
  Vec<float> p = t * 0.5307027145f - 0.7265760135f;
  p = p * t + 0.7107068705f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  const Vec<float> beyond = p * t * bell;
  return {x < 0 ? beyond : 1.f - beyond, bell};
}
inline Normal<double> normal_(double x) { return {0.5 * (1 + std::erf(x * 0.70710678118654752440)), std::exp(-0.5 * x * x)}; }

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
  static constexpr T half_normal = T(0.39894228040143267794), tanh_scale = T(0.79788456080286535588),
                     tanh_cube = T(0.044715);
};

template <class X, class T>
struct Identity {
  static X value(X x) { return x; }
  static X slope(X) { return X{} + 1; }
};
template <class X, class T>
struct Gelu {
  static X value(X x) { return x * normal_(x).up_to; }
  static X slope(X x) {
    const Normal<X> normal = normal_(x);
    return normal.up_to + x * (Constants<T>::half_normal * normal.bell);
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
