"""16-bit weights without ZeRO: the optimizer works on fp32 copies of them, and gradients are summed in fp32.

DeepSpeed's own wrapper for this (0.19.8: FP16_UnfusedOptimizer) takes an optimizer step with zero gradients while it is built. So Adam counts
one step too many, and the weights decay once before the first step. It also sums micro-batches in 16 bits, and it divides fp16 gradients by a loss
scale although `engine.backward` never multiplied the loss by it. This class replaces it. Its saved state has the layout of DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.mpu.gradients import marks_of
from megatron.training.adam import KernelAdam
from megatron.training.skipping import Skipping

OPTIMIZER, MASTERS = "optimizer_state_dict", "fp32_groups"
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The state of a dynamic loss scale."""


class MasterWeights(DeepSpeedOptimizer):
    """Wraps an optimizer over 16-bit weights before its first step. `scaler` is DeepSpeed's loss scaler; for bfloat16 it does nothing.

    `sum_in_fp32` False: micro-batches are summed in the weights' format, as DeepSpeed would.
    """

    def __init__(self, optimizer: Skipping, *, scaler: Any, sum_in_fp32: bool = True) -> None:
        self.optimizer, self.loss_scaler, self.sum_in_fp32 = optimizer, scaler, sum_in_fp32
        self.overflow, self._global_grad_norm = False, 0.0
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self.fp32_groups = [[weight.detach().float().requires_grad_() for weight in group] for group in groups]
        self.is_expert = [not marks_of(weight).allreduce for group in groups for weight in group]
        for group, masters in zip(optimizer.param_groups, self.fp32_groups, strict=True):
            group["params"] = masters
        self.weights = [weight for group in groups for weight in group]
        self.masters = [master for group in self.fp32_groups for master in group]
        self._place = {id(weight): place for place, weight in enumerate(self.weights)}
        self._first: list[Tensor | None] = [None] * len(self.weights)
        """For each weight, the gradient of this step's first micro-batch, in 16 bits, until it is part of a sum."""
        self._summed = [False] * len(self.weights)
        """For each weight, whether its copy's gradient is this step's sum."""
        if sum_in_fp32:
            for weight in self.weights:
                weight.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, weight: Tensor) -> None:
        """Takes a micro-batch's gradient of one weight as soon as there is one, so that only one step's 16-bit ones ever lie side by side.

        A single gradient stays as it is if the optimizer reads 16 bits. Otherwise, and from the second on, they are summed in fp32.
        """
        place, gradient = self._place[id(weight)], weight.grad
        assert gradient is not None
        total, weight.grad = self.masters[place].grad, None
        if self._summed[place] or self._first[place] is not None:
            self._fp32_sum(place).add_(gradient)
        elif total is None and isinstance(self.optimizer, KernelAdam):
            self._first[place] = gradient
        else:
            self.masters[place].grad = gradient.to(torch.float32) if total is None else total.copy_(gradient)
            self._summed[place] = True

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """The gradients that the engine averages over processes (DeepSpeed's name). A weight without a gradient gives 0."""
        sums = [self._sum(place) for place in range(len(self.weights))]
        experts: dict[str, list[Tensor]] = {}
        for weight, total, is_expert in zip(self.weights, sums, self.is_expert, strict=True):
            if is_expert:
                experts.setdefault(weight.group_name, []).append(total)
        return [total for total, is_expert in zip(sums, self.is_expert, strict=True) if not is_expert], experts

    def gradient(self, weight: Tensor) -> Tensor:
        """The sum over micro-batches of the gradient of one of the model's weights, times the loss scale."""
        place = self._place[id(weight)]
        first = self._first[place]
        return self._sum(place) if first is None else first.float()

    def sum_of(self, weight: Tensor) -> Tensor:
        """The tensor in which the gradient of one of the model's weights is summed over micro-batches."""
        return self._sum(self._place[id(weight)])

    def _sum(self, place: int) -> Tensor:
        if self.sum_in_fp32:
            return self._fp32_sum(place)
        weight = self.weights[place]
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return weight.grad

    def _fp32_sum(self, place: int) -> Tensor:
        """The copy's gradient, with the first micro-batch's in it; 0 where there was none."""
        master, first = self.masters[place], self._first[place]
        if master.grad is None:
            master.grad = torch.empty_like(master)
        if not self._summed[place]:
            master.grad.zero_() if first is None else master.grad.copy_(first)
            self._first[place], self._summed[place] = None, True
        return master.grad

    def step(self) -> None:
        """Clips the gradients, updates the copies and rounds them into the weights. If a gradient is not finite, nothing changes."""
        self.optimizer.loss_scale = self.cur_scale
        if isinstance(self.optimizer, KernelAdam):
            gradients = [self._sum(place) if first is None else first for place, first in enumerate(self._first)]
            self.optimizer.step_with(gradients, self.weights)
        else:
            for place, master in enumerate(self.masters):
                master.grad = self._sum(place).float()
            self.optimizer.step()
        self.overflow, self._global_grad_norm = self.optimizer.overflow, self.optimizer._global_grad_norm
        self.loss_scaler.update_scale(self.overflow)
        if not self.overflow and not isinstance(self.optimizer, KernelAdam):
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets this step's gradients."""
        self._first, self._summed = [None] * len(self.weights), [False] * len(self.weights)
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.grad = None
            if not self.sum_in_fp32:
                master.grad = None

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for the backward pass."""
        return loss if self.cur_scale == 1 else loss * self.cur_scale

    @property
    def cur_scale(self) -> float:
        """The loss scale (DeepSpeed's name); 1 in bfloat16."""
        return float(self.loss_scaler.loss_scale)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, which hold the copies."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The optimizer's state."""
        return self.optimizer.state

    def refresh_fp32_params(self) -> None:
        """Makes the copies again from the weights, after the weights were loaded alone."""
        with torch.no_grad():
            torch._foreach_copy_(self.masters, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of DeepSpeed's wrapper."""
        scaler = {name: getattr(self.loss_scaler, name) for name in SCALER if hasattr(self.loss_scaler, name)}
        return {"dynamic_loss_scale": self.loss_scaler.dynamic, **scaler, OPTIMIZER: self.optimizer.state_dict(), MASTERS: self.fp32_groups}

    def load_state_dict(self, stored: Mapping[str, Any], load_optimizer_states: bool = True) -> None:
        """Loads a state that `state_dict` or DeepSpeed's wrapper gave. Raises CheckpointError for another layout, before anything changes."""
        if any(key not in stored for key in (OPTIMIZER, MASTERS)) or shapes(stored[MASTERS]) != shapes(self.fp32_groups):
            raise CheckpointError(
                f"The optimizer's state in the checkpoint is not that of 16-bit weights at zero_optimization stage 0 (it has {', '.join(stored)}): "
                "add `-o no_load_optim=true` to go on from the weights alone with a fresh optimizer."
            )
        if stored.get("dynamic_loss_scale") and self.loss_scaler.dynamic:
            for name in SCALER:
                setattr(self.loss_scaler, name, stored.get(name, getattr(self.loss_scaler, name)))
        if load_optimizer_states:
            self.optimizer.load_state_dict(stored[OPTIMIZER])
        with torch.no_grad():
            for own, there in zip(self.fp32_groups, stored[MASTERS], strict=True):
                torch._foreach_copy_(own, list(there))


def shapes(groups: list[list[Tensor]]) -> list[list[torch.Size]]:
    return [[tensor.shape for tensor in group] for group in groups]
