"""Normalisation: one short class per kind, chosen by the model section.

Shapes: B batch; S sequence; D what is normalised, the model's width unless said otherwise.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron.kernels.backends import Choice, choose
from megatron.kernels.rms_norm import OP, rms_norm
from megatron.model.apex import LayerNormFunction, layer_norm, reason_against_apex

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig

LOGGER = logging.getLogger(__name__)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, computed by PyTorch or by another function with the same arguments."""

    function: LayerNormFunction = staticmethod(functional.layer_norm)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape and dtype as given."""
        return self.function(x_BSD, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + epsilon), the division in float32 whatever the dtype, as NeoX has it. The mean is over the last dimension."""

    def __init__(self, shape: tuple[int, ...], epsilon: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.epsilon, self.backend = epsilon, "auto"

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape and dtype as given."""
        return rms_norm(x_BSD, self.scale, self.epsilon, backend=self.backend)


class ScaleNorm(nn.Module):
    """g * x / max(|x|, epsilon) with a single weight g (Nguyen and Salazar, 2019, equation 5); |x| is the length along the last dimension."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.epsilon = epsilon

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape and dtype as given."""
        wide = _widened(x_BSD)
        return self.g * (wide / wide.norm(dim=-1, keepdim=True).clamp(min=self.epsilon)).to(x_BSD.dtype)


def build_norm(model: ModelConfig, *shape: int) -> nn.Module:
    """The norm that the model section names, over `hidden_size` or over the last dimensions of the sizes given.

    Of several dimensions layernorm takes mean and variance over all, rmsnorm and scalenorm over the last; the weights have their shape.
    """
    shape = shape or (model.hidden_size,)
    if model.norm == "rmsnorm":
        return RMSNorm(shape, model.rms_norm_epsilon)
    if model.norm == "scalenorm":
        return ScaleNorm(model.scalenorm_epsilon)
    affine = model.norm == "layernorm"
    return LayerNorm(shape, eps=model.layernorm_epsilon, elementwise_affine=affine, bias=affine and model.use_bias_in_norms)


def norm_choice(model: ModelConfig, device_type: str, backend: str) -> Choice | None:
    """What computes the norms. `backend`: the implementation of `rms_norm` (`kernel_backends`). None: there is no choice.

    NeoX's `rmsnorm_fusion` and `layernorm_fusion` ask for apex. Raises KernelUnavailable where `backend` cannot run.
    """
    if model.norm == "rmsnorm":
        chosen = choose(OP, backend, device_type)
        if backend != "auto" or not model.rmsnorm_fusion:
            return chosen
        reason = reason_against_apex(model, device_type)
        return Choice("rms_norm", "apex", "") if reason is None else chosen._replace(because=f"rmsnorm_fusion: {reason}")
    if model.norm == "scalenorm" or not model.layernorm_fusion:
        return None
    reason = reason_against_apex(model, device_type)
    return Choice("layernorm", "PyTorch", f"layernorm_fusion: {reason}") if reason is not None else Choice("layernorm", "apex", "")


def choose_norms(model: ModelConfig, gpt: nn.Module, backend: str = "auto") -> None:
    """Every norm is computed as `norm_choice` says. If apex is asked for and cannot compute, the log says why.

    Call it when the model is on its final device. A second call changes nothing.
    """
    choice = norm_choice(model, next(gpt.parameters()).device.type, backend)
    if choice is None:
        return
    if "_fusion: " in choice.because:
        LOGGER.info("%s. The norms are computed without apex.", choice.because)
    for module in gpt.modules():
        if isinstance(module, RMSNorm):
            module.backend = choice.runs
        elif isinstance(module, LayerNorm) and choice.runs == "apex":
            module.function = layer_norm


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
