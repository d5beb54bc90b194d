"""Layernorm by the fused kernels of NVIDIA's apex: NeoX's key `layernorm_fusion`, on CUDA devices. For rmsnorm see `megatron/kernels/rms_norm`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from megatron.kernels.rms_norm import apex

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig

LayerNormFunction = Callable[[Tensor, Sequence[int], Tensor | None, Tensor | None, float], Tensor]
"""(x, shape, weight, bias, epsilon) -> the normalised x, as `torch.nn.functional.layer_norm`. Weight and bias None: no weights."""


def reason_against_apex(model: ModelConfig, device_type: str) -> str | None:
    """Why apex cannot compute this model's norms. None: it can."""
    if device_type != "cuda":
        return f"apex runs on CUDA devices only, and this device is {device_type}"
    if model.norm == "layernorm" and not model.use_bias_in_norms:
        return "apex has no layernorm with weights and without biases (use_bias_in_norms: false)"
    return apex.unavailable()


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """The last dimensions of x normalised; weight and bias are both there or both None."""
    fused = importlib.import_module("apex.normalization.fused_layer_norm")
    if weight is None:
        plain: Tensor = fused.fused_layer_norm(x, shape, epsilon)
        return plain
    weighted: Tensor = fused.fused_layer_norm_affine(x, weight, bias, shape, epsilon)
    return weighted
