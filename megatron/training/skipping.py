"""Optimizers that clip gradients and skip steps that are not finite, for ZeRO stage 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.mpu.gradients import GlobalNorm
from megatron.training.lion import Lion


class Skipping(torch.optim.Optimizer):
    """A base class put before an optimizer class. It clips by the global gradient norm, and changes nothing if that norm is not finite.

    It is for ZeRO stage 0, where DeepSpeed itself would write NaN into the weights. DeepSpeed reads `overflow` and `_global_grad_norm` after each
    step.
    Clipping uses the loss scaling of PyTorch's fused kernels (`grad_scale`, `found_inf`), so it needs no extra pass over the gradients.
    """

    def __init__(self, groups: list[dict[str, Any]], *, max_norm: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.max_norm = max_norm
        self.global_norm: GlobalNorm | None = None
        """The norm over all processes that share the model. None: this process has all gradients."""
        self.loss_scale = 1.0
        """The gradients are still multiplied by this number."""
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        every = [p.grad for group in self.param_groups for p in group["params"]]
        gradients = [gradient for gradient in every if gradient is not None]
        norm = nn.utils.get_total_norm(gradients) if self.global_norm is None else self._norm_of_all(self.global_norm, every)
        norm = norm / self.loss_scale
        self._global_grad_norm = norm.item()
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return None
        self._divide(gradients, self._clip_divisor(norm) * self.loss_scale)
        loss: float | None = super().step(closure)
        return loss

    @staticmethod
    def _norm_of_all(global_norm: GlobalNorm, gradients: list[Tensor | None]) -> Tensor:
        norm = global_norm.total(gradients, lambda own: nn.utils.get_total_norm(own).item())
        return torch.tensor(norm, dtype=torch.float32, device=next(gradient.device for gradient in gradients if gradient is not None))

    def _divide(self, gradients: list[Tensor], divisor: Tensor) -> None:
        self.grad_scale = divisor
        self.found_inf = torch.zeros((), dtype=torch.float32, device=divisor.device)

    def _clip_divisor(self, norm: Tensor) -> Tensor:
        """What the gradients are divided by: norm / max_norm where that is above 1."""
        if self.max_norm <= 0:
            return torch.ones((), dtype=torch.float32, device=norm.device)
        return (norm.float() / self.max_norm).clamp(min=1.0)


class SkippingAdam(Skipping, torch.optim.Adam):
    """PyTorch's fused Adam, with decoupled weight decay or without."""


class SkippingSGD(Skipping, torch.optim.SGD):
    """PyTorch's fused SGD."""


class SkippingLion(Skipping, Lion):
    """Our own Lion, which reads `grad_scale`."""


class DividingFirst(Skipping):
    """For an optimizer that cannot divide the gradients: they are divided in place before its step."""

    def _divide(self, gradients: list[Tensor], divisor: Tensor) -> None:
        torch._foreach_div_(gradients, divisor)
