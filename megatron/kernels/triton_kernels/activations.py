"""The activations of `kernels.activations` and their derivatives, as Triton functions of float32 or float64 numbers. NaN stays NaN."""

from __future__ import annotations

import triton
import triton.language as tl

# A constant stands to the right of a tensor: the interpreter cannot multiply them the other way round.
INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
# gelu_tanh(x) = x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3)): the same function as the one with tanh.
TANH_SCALE = tl.constexpr(1.5957691216057308)
TANH_CUBE = tl.constexpr(0.044715)
# mish(x) = x to the last bit of float64 from here on, and e^x * (e^x + 2) is far from overflow.
MISH_LIMIT = tl.constexpr(40.0)


@triton.jit
def sigmoid(x):
    """By an exponential that cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh_of_softplus(x):
    """w / (w + 2) with w = e^x (e^x + 2)."""
    e = tl.exp(tl.where(x > MISH_LIMIT, MISH_LIMIT, x))
    w = e * (e + 2.0)
    return w / (w + 2.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x)."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * INVERSE_SQRT_2))
    elif ACTIVATION == "gelu_tanh":
        return x * sigmoid((x + x * x * x * TANH_CUBE) * TANH_SCALE)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "sigmoid":
        return sigmoid(x)
    elif ACTIVATION == "mish":
        return x * tanh_of_softplus(x)
    elif ACTIVATION == "softsign":
        return x / (1.0 + tl.abs(x))
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """act'(x)."""
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * INVERSE_SQRT_2)) + x * INVERSE_SQRT_2_PI * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid((x + x * x * x * TANH_CUBE) * TANH_SCALE)
        return s + x * s * (1.0 - s) * TANH_SCALE * (x * x * TANH_CUBE * 3.0 + 1.0)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "sigmoid":
        s = sigmoid(x)
        return s * (1.0 - s)
    elif ACTIVATION == "mish":
        t = tanh_of_softplus(x)
        return t + x * (1.0 - t * t) * sigmoid(x)
    elif ACTIVATION == "softsign":
        d = 1.0 + tl.abs(x)
        return 1.0 / (d * d)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(x.shape, 1.0, x.dtype)
