"""The Lion optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Chen et al., 2023 (Symbolic discovery of optimization algorithms), program 1, with gradient g, weights w and their average m, from 0:

        u = sign(beta1 m + (1 - beta1) g);    w = w - lr (u + weight_decay w);    m = beta2 m + (1 - beta2) g

    `grad_scale`, an attribute as on PyTorch's fused optimizers, divides the gradients where it is set.
    """

    def __init__(self, groups: Any, *, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._step_group(weights, [self._average(p) for p in weights], group)
        return loss

    def _step_group(self, weights: list[Tensor], averages: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in weights if p.grad is not None]
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            gradients = list(torch._foreach_div(gradients, scale))
        lr, (beta1, beta2) = group["lr"], group["betas"]
        updates = torch._foreach_lerp(averages, gradients, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-lr)
        torch._foreach_lerp_(averages, gradients, 1 - beta2)

    def _average(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
        average: Tensor = state["exp_avg"]
        return average
