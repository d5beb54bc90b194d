"""Latent MoE: experts read and write a vector that is narrower than the hidden state (`moe_latent_size`; Megatron-Core 0.19, Nemotron 3).

Shapes: ... any leading dimensions; D model width; Z latent width.

    y = (sum over the chosen experts of weight_e * expert_e(x W_down)) W_up
One W_down and one W_up for all experts of a layer. The router and the shared expert read x, and the shared expert's output is added after W_up.
Rows travel to the experts of other processes and back at width Z. The source is Megatron-Core 0.19.2 (`moe_layer.py`: `fc1_latent_proj` and
`fc2_latent_proj`).

Our choices: no biases (theirs follow `add_bias_linear`), and the projections start with standard deviations of 1/sqrt(D) and 1/sqrt(Z), so that
numbers keep their size in them (theirs start like the model's other matrices). With Z = D the layer still has both projections.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from megatron.model.initialization import Initializer
from megatron.model.mlp import build_linear


class LatentProjection(nn.Module):
    """From the hidden state to what experts read, and from what they write back."""

    def __init__(self, width: int, latent: int, init: Initializer) -> None:
        super().__init__()
        self.down = build_linear(width, latent, bias=False, fill=init.normal(1 / math.sqrt(width)))
        self.up = build_linear(latent, width, bias=False, fill=init.normal(1 / math.sqrt(latent)))

    def enter(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., Z]."""
        z: Tensor = self.down(x)
        return z

    def leave(self, z: Tensor) -> Tensor:
        """[..., Z] -> [..., D]."""
        y: Tensor = self.up(z)
        return y


class NoLatent(nn.Module):
    """Experts read and write the hidden state."""

    def enter(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def leave(self, z: Tensor) -> Tensor:
        """z."""
        return z


def build_latent(width: int, latent: int | None, init: Initializer) -> LatentProjection | NoLatent:
    """The projections around the experts. `latent` None: there are none."""
    return NoLatent() if latent is None else LatentProjection(width, latent, init)
