"""Adam by the op `adam` (`megatron/kernels/adam`) at ZeRO stage 0: clipping, update and rounding into 16-bit weights in one pass over memory.

Its state and its saved state are those of torch.optim.Adam, so a run can go on with either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.adam import OP, AdamSettings, AdamTensors, adam_update, gradient_norm
from megatron.training.skipping import SkippingAdam


def is_compiled(device_type: str) -> bool:
    """Whether the op's own implementation runs on such a device: its definition in Python is slower than PyTorch's fused Adam."""
    return OP.status(device_type)["compiled"] is None and OP.choose("auto", device_type) == "compiled"


class KernelAdam(SkippingAdam):
    """PyTorch's Adam without `amsgrad` and `maximize`, for weights in float32. Gradients may have another format than their weights."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        self.step_with([p.grad for group in self.param_groups for p in group["params"]])
        return loss

    @torch.no_grad()
    def step_with(self, gradients: Sequence[Tensor | None], rounded: Sequence[Tensor] | None = None) -> None:
        """A step with these gradients of all weights in the order of the groups. Weights without one stay. `rounded` takes the new weights."""
        if self.global_norm is None:
            norm = gradient_norm([gradient for gradient in gradients if gradient is not None]) / self.loss_scale
        else:
            norm = self.global_norm.total(gradients, gradient_norm) / self.loss_scale
        self._global_grad_norm, self.overflow = norm, not math.isfinite(norm)
        if self.overflow:
            return
        divisor = self.loss_scale * (max(1.0, norm / self.max_norm) if self.max_norm > 0 else 1.0)
        place = 0
        for group in self.param_groups:
            end = place + len(group["params"])
            self._update(group, gradients[place:end], None if rounded is None else rounded[place:end], divisor)
            place = end

    def _update(self, group: dict[str, Any], gradients: Sequence[Tensor | None], rounded: Sequence[Tensor] | None, divisor: float) -> None:
        places = [place for place, gradient in enumerate(gradients) if gradient is not None]
        weights = [group["params"][place] for place in places]
        states = [self._state_of(weight) for weight in weights]
        steps: list[Tensor] = [state["step"] for state in states]
        if steps:
            torch._foreach_add_(steps, 1)
        tensors = AdamTensors(
            weights=weights,
            gradients=[gradient for gradient in gradients if gradient is not None],
            averages=[state["exp_avg"] for state in states],
            squares=[state["exp_avg_sq"] for state in states],
            steps=[step.item() for step in steps],
            rounded=None if rounded is None else [rounded[place] for place in places],
        )
        chosen = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")}
        adam_update(tensors, AdamSettings(**chosen, divisor=divisor))

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        """torch.optim.Adam's state, made at the first step as it does."""
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state
