"""Adam's update and the norm of the gradients by csrc/adam: one pass over memory each, all tensors in one parallel region."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.adam.interface import AdamSettings, AdamTensors
from megatron.kernels.adam.reference import Reference
from megatron.kernels.compiled import address, built

NARROW = torch.bfloat16
GRADIENTS = (torch.float32, NARROW)


class Compiled:
    """Contiguous float32 tensors on the CPU, and bfloat16 for gradients and rounded weights. The reference does the rest."""

    def __init__(self) -> None:
        self.built = built()
        self.reference = Reference()

    def norm(self, gradients: list[Tensor]) -> float:
        """The same whatever the number of threads."""
        if not all(t.is_cpu and t.dtype != torch.float64 for t in gradients):
            return self.reference.norm(gradients)
        readable = _readable(gradients)  # a name, which keeps copies alive during the call
        length: float = self.built.gradient_norm(*_described(readable), torch.get_num_threads())
        return length

    def update(self, tensors: AdamTensors, settings: AdamSettings) -> None:
        """Weights are rounded to nearest, ties to even, as PyTorch does."""
        if not _serves(tensors):
            self.reference.update(tensors, settings)
            return
        gradients = _readable(tensors.gradients)
        changed = [tensors.weights, tensors.averages, tensors.squares]
        places = [[address(t) for t in each] for each in changed]
        places.append([0] * len(gradients) if tensors.rounded is None else [address(t) for t in tensors.rounded])
        numbers = [settings.lr, *settings.betas, settings.eps, settings.weight_decay, settings.divisor]
        decoupled, threads = settings.decoupled_weight_decay, torch.get_num_threads()
        self.built.adam_update(*_described(gradients), places, tensors.steps, numbers, decoupled, threads)
        for each in (*changed, tensors.rounded or []):
            torch.autograd.graph.increment_version(each)  # autograd did not see the change


def _serves(tensors: AdamTensors) -> bool:
    wide = [*tensors.weights, *tensors.averages, *tensors.squares]
    there = [*((t, torch.float32) for t in wide), *((t, NARROW) for t in tensors.rounded or [])]
    return all(t.is_cpu and t.dtype == dtype and t.is_contiguous() for t, dtype in there) and all(t.is_cpu for t in tensors.gradients)


def _readable(gradients: list[Tensor]) -> list[Tensor]:
    """As csrc reads them. The caller keeps the list."""
    return [(t if t.dtype in GRADIENTS else t.float()).contiguous() for t in gradients]


def _described(gradients: list[Tensor]) -> tuple[list[int], list[int], list[int]]:
    return [t.numel() for t in gradients], [address(t) for t in gradients], [int(t.dtype == NARROW) for t in gradients]
