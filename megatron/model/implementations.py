"""Which implementations compute a model: decided once, when it has its device and number format, and logged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from megatron.kernels.backends import Choice, choose_backends
from megatron.model.attention.choice import attention_choice, choose_attention
from megatron.model.moe.layer import MoELayer
from megatron.model.norms import choose_norms, norm_choice

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig
    from megatron.model.gpt import GPT

LOGGER = logging.getLogger(__name__)
OF_EXPERTS = ("grouped_gemm", "grouped_lore", "permute", "route")
"""The ops of layers with experts."""
OF_LIBRARY = ("experts", "route")
"""The same where one library computes dispatch and experts."""
OF_DIVIDED_LIBRARY = ("experts", "permute", "route")
"""The same where it computes the experts of this process, and rows are sent."""


def choices(model: ModelConfig, moe: MoEConfig, device: torch.device, dtype: torch.dtype, *, apart: bool, sends: bool) -> list[Choice]:
    """What computes each part of such a model that can be computed in several ways, and why nothing better does. A dense model has no ops of experts.

    `apart`: documents do not see each other. `sends`: processes send each other rows of experts. Raises KernelUnavailable for an implementation that
    `kernel_backends` names and that cannot run.
    """
    named = moe.kernel_backends
    norms = norm_choice(model, device.type, named.get("rms_norm", "auto"))
    of_library = OF_DIVIDED_LIBRARY if sends else OF_LIBRARY
    of_experts = (*(("dispatch",) if sends else ()), *(OF_EXPERTS if moe.dispatcher == "local" else of_library))
    ops = ("linear_cross_entropy", *(of_experts if moe.has_experts else ()))
    attention = attention_choice(model, device, dtype, named.get("attention", "auto"), apart=apart)
    return [attention, *([] if norms is None else [norms]), *choose_backends(named, device.type, ops)]


def choose_implementations(model: ModelConfig, moe: MoEConfig, gpt: GPT) -> None:
    """Puts them in place, with one line in the log for each. Call it when the model is on its final device; a second call changes nothing.

    Raises KernelUnavailable as `choices` does.
    """
    weight = next(gpt.parameters())
    sends = any(isinstance(module, MoELayer) and module.sends for module in gpt.modules())
    for choice in choices(model, moe, weight.device, weight.dtype, apart=gpt.separate_attention, sends=sends):
        LOGGER.info("kernel %s on %s: %s", choice.part, weight.device.type, choice.runs)
    choose_attention(model, gpt, moe.kernel_backends.get("attention", "auto"))
    choose_norms(model, gpt, moe.kernel_backends.get("rms_norm", "auto"))
