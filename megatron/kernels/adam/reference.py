"""Adam's update one operation after the other: any device, any format; the definition that the others are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.kernels.adam.interface import AdamSettings, AdamTensors


class Reference:
    """Several passes over memory for each tensor."""

    def norm(self, gradients: list[Tensor]) -> float:
        """Summed in float64."""
        return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))

    @torch.no_grad()
    def update(self, tensors: AdamTensors, settings: AdamSettings) -> None:
        """Kingma and Ba, 2015, algorithm 1; decoupled weight decay: Loshchilov and Hutter, 2019, algorithm 2."""
        lr, (beta1, beta2), eps, decay, decoupled, divisor = settings
        for weight, given, average, square, step in zip(*tensors[:5], strict=True):
            gradient = given.to(weight.dtype) / divisor
            if decoupled:
                weight.mul_(1 - lr * decay)
            else:
                gradient.add_(weight, alpha=decay)
            average.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (square.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
            weight.addcdiv_(average, root, value=-lr / (1 - beta1**step))
        for rounded, weight in zip(tensors.rounded or [], tensors.weights, strict=False):
            rounded.copy_(weight)
