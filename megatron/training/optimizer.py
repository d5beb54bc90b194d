"""AdamW over two groups of parameters: with and without weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.optimizer import OptimizerConfig


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that clips by the global gradient norm and leaves everything as it is when that norm is not finite.

    It is for ZeRO stage 0, where DeepSpeed itself would step into NaN; DeepSpeed reads `overflow` and `_global_grad_norm` after each step.
    Clipping and skipping ride on the fused kernel's `grad_scale` and `found_inf`, so neither needs a pass over the gradients of its own.
    """

    def __init__(self, groups: list[dict[str, Any]], *, max_norm: float, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self.max_norm = max_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._global_grad_norm = norm.item()
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return None
        self.grad_scale = self._clip_divisor(norm)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=norm.device)
        return super().step(closure)

    def _clip_divisor(self, norm: Tensor) -> Tensor:
        """What the gradients are divided by: norm / max_norm where that is above 1."""
        if self.max_norm <= 0:
            return torch.ones((), dtype=torch.float32, device=norm.device)
        return (norm.float() / self.max_norm).clamp(min=1.0)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps. torch's fused AdamW: nothing is compiled, and DeepSpeed's own would take a minute to build on a CPU.

    With ZeRO 1 to 3 DeepSpeed clips, and skips steps whose gradients are not finite; with stage 0 the optimizer does both.
    """
    params = config.optimizer.params
    settings: dict[str, Any] = {"lr": params.lr, "betas": params.betas, "eps": params.eps}
    groups = parameter_groups(model, config.weight_decay)
    if config.zero_optimization.stage == 0:
        return SkippingAdamW(groups, max_norm=config.gradient_clipping, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, as in NeoX: matrices decay; biases and the parameters of norms (everything with one dimension) do not."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    exempt = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
