"""The gradient noise scale: up to about this batch size a larger batch is worth its compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

KEPT = 0.99
"""A measurement keeps this share of the running averages, as in GPT-NeoX."""


class NoiseScale:
    """McCandlish et al., 2018 (An empirical model of large-batch training), appendix A.1: g_i are the gradients of n batches of b sequences, B = n b,

        |G_small|^2 = mean |g_i|^2              |G_big|^2 = |mean g_i|^2
        |G|^2 = (B |G_big|^2 - b |G_small|^2) / (B - b)
        S     = (|G_small|^2 - |G_big|^2) / (1 / b - 1 / B)
        noise scale = S / |G|^2, each of them averaged over the measurements so far

    It keeps one sum of gradients, on `device` (None: on the device of the gradients). `total` sums a number over the processes that hold the other
    gradients (None: there are none).
    """

    def __init__(self, *, batch: int, n_batches: int, device: torch.device | None = None, total: Callable[[float], float] | None = None) -> None:
        self.small, self.big, self.n_batches = batch, batch * n_batches, n_batches
        self.device, self._total = device, total or float
        self._sums: list[Tensor] = []
        self._squares: list[float] = []
        self._signal = self._noise = 0.0

    def add(self, gradients: Iterable[Tensor]) -> float | None:
        """Adds the gradients of one batch. Returns the noise scale after every n-th batch. A batch with gradients that are not finite is left out.

        After only a few measurements the noise scale may be negative, because both averages are estimates.
        """
        mine = [gradient.to(device=self.device, dtype=torch.float32, copy=True) for gradient in gradients]
        square = self._total(_square(mine))
        if not math.isfinite(square):
            return None
        self._squares.append(square)
        if self._sums:
            torch._foreach_add_(self._sums, mine)
        else:
            self._sums = mine
        return self._measure() if len(self._squares) == self.n_batches else None

    def _measure(self) -> float:
        small, big = sum(self._squares) / self.n_batches, self._total(_square(self._sums)) / self.n_batches**2
        self._sums, self._squares = [], []
        self._signal = KEPT * self._signal + (1 - KEPT) * (self.big * big - self.small * small) / (self.big - self.small)
        self._noise = KEPT * self._noise + (1 - KEPT) * (small - big) / (1 / self.small - 1 / self.big)
        return self._noise / self._signal if self._signal else math.inf


def _square(tensors: list[Tensor]) -> float:
    """The squared norm of all of them together."""
    return float(torch.stack(torch._foreach_norm(tensors)).square().sum())
