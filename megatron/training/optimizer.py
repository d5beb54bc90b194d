"""Optimizers over two groups of parameters, with and without weight decay. At ZeRO stage 0 they clip gradients and skip steps that are not finite."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from megatron.config.machine import is_installed
from megatron.config.optimizer import OptimizerConfig
from megatron.kernels.adam import OP
from megatron.kernels.backends import Choice, choose
from megatron.mpu.gradients import GlobalNorm, marks_of
from megatron.mpu.groups import current_groups
from megatron.training.adam import KernelAdam, is_compiled
from megatron.training.lion import Lion
from megatron.training.skipping import DividingFirst, Skipping, SkippingAdam, SkippingLion, SkippingSGD


class OptimizerUnavailable(ValueError):
    """The configured optimizer needs a package or a device that is missing. The message says which."""


def build_optimizer(config: OptimizerConfig, model: nn.Module, device_type: str) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps, for training on a device of this type (PyTorch's name: "cpu", "cuda", ...).

    With ZeRO 1 to 3 DeepSpeed clips and skips steps whose gradients are not finite. At stage 0 the optimizer does both. Raises OptimizerUnavailable.
    """
    groups = parameter_groups(model, config.weight_decay)
    kind, settings = choose_optimizer(config, device_type)
    settings["lr"] = config.optimizer.params.lr
    if config.zero_optimization.stage > 0:
        return kind(groups, **settings)
    own = _reason_against_kernel(config, device_type) is None
    optimizer: Skipping = (KernelAdam if own else skipping(kind))(groups, max_norm=config.gradient_clipping, **settings)
    shared = current_groups()
    if shared.model.size * shared.expert.size > 1:
        optimizer.global_norm = GlobalNorm(shared, [parameter for group in groups for parameter in group["params"]])
    return optimizer


def optimizer_choice(config: OptimizerConfig, device_type: str) -> Choice:
    """What will update the weights, and why not the op `adam`. An optimizer that cannot run here is said to be missing, with the reason."""
    try:
        kind, _ = choose_optimizer(config, device_type)
    except OptimizerUnavailable as error:
        return Choice("optimizer", "none", str(error))
    reason = _reason_against_kernel(config, device_type)
    package = kind.__module__.split(".")[0]
    runs = f"{kind.__name__} of {'PyTorch' if package == 'torch' else 'this program' if package == 'megatron' else package}"
    return Choice("optimizer", "compiled", "") if reason is None else Choice("optimizer", runs, reason)


def _reason_against_kernel(config: OptimizerConfig, device_type: str) -> str | None:
    """Why the op `adam` does not compute; empty where nothing is to be said of it. None: it does."""
    if config.optimizer_type not in ("Adam", "AdamW") or config.optimizer.implementation != "auto":
        return ""
    if config.zero_optimization.stage > 0:
        return f"compiled: only at ZeRO stage 0, and this is stage {config.zero_optimization.stage}" if device_type == "cpu" else ""
    return None if is_compiled(device_type) else choose(OP, "auto", device_type).because


def skipping(kind: type[torch.optim.Optimizer]) -> Callable[..., Skipping]:
    """The same optimizer with clipping and skipping."""
    built_in: dict[Any, Callable[..., Skipping]] = {torch.optim.Adam: SkippingAdam, torch.optim.SGD: SkippingSGD, Lion: SkippingLion}
    return built_in[kind] if kind in built_in else type(f"Skipping{kind.__name__}", (DividingFirst, kind), {})


Chosen = tuple[Any, dict[str, Any]]
"""An optimizer class and its settings, without the learning rate."""


def choose_optimizer(config: OptimizerConfig, device_type: str) -> Chosen:
    """The configured optimizer class. Raises OptimizerUnavailable for a package that is not installed or cannot run on a device of this type."""
    return KINDS[config.optimizer_type](config, device_type)


def _adam(config: OptimizerConfig, device_type: str) -> Chosen:
    """As apex's FusedAdam, GPT-NeoX's first choice: decoupled weight decay (Loshchilov and Hutter, 2019) unless `adam_w_mode` is false."""
    settings, implementation = config.optimizer_settings, config.optimizer.implementation
    decoupled = settings.pop("adam_w_mode", True)
    if implementation in ("auto", "torch"):
        return torch.optim.Adam, {**settings, "decoupled_weight_decay": decoupled, "fused": True}
    if device_type != "cuda":
        raise OptimizerUnavailable(
            f"optimizer.implementation: {implementation} runs on CUDA only, and this device is {device_type}: leave the key out"
        )
    return _fused_adam(implementation), {**settings, "adam_w_mode": decoupled}


def _fused_adam(name: str) -> Any:
    """FusedAdam of apex or DeepSpeed. DeepSpeed's has to be compiled already: it would be compiled at the start of the run otherwise."""
    try:
        if name == "apex":
            return importlib.import_module("apex.optimizers").FusedAdam
        if importlib.import_module("deepspeed.git_version_info").installed_ops.get("fused_adam"):
            return importlib.import_module("deepspeed.ops.adam").FusedAdam
    except (ImportError, AttributeError) as error:
        raise OptimizerUnavailable(f"optimizer.implementation: {name} needs {name}'s FusedAdam, which is not installed ({error})") from error
    raise OptimizerUnavailable(
        "optimizer.implementation: deepspeed needs DeepSpeed installed with DS_BUILD_FUSED_ADAM=1. The installed DeepSpeed was built without it"
    )


def _adam_8bit(config: OptimizerConfig, device_type: str) -> Chosen:
    """Dettmers et al., 2022: the averages in blocks of 8-bit numbers; weight decay is decoupled."""
    if not is_installed("bitsandbytes"):
        raise OptimizerUnavailable(
            "Adam8bit (use_bnb_optimizer: true) needs the package 'bitsandbytes': pip install bitsandbytes, or use Adam "
            "(the version: requirements/requirements-bitsandbytes.txt)"
        )
    return importlib.import_module("bitsandbytes.optim").Adam8bit, config.optimizer_settings


def _sgd(config: OptimizerConfig, device_type: str) -> Chosen:
    return torch.optim.SGD, {**config.optimizer_settings, "fused": True}


def _lion(config: OptimizerConfig, device_type: str) -> Chosen:
    return Lion, config.optimizer_settings


KINDS: dict[str, Callable[[OptimizerConfig, str], Chosen]] = {
    "Adam": _adam,
    "AdamW": _adam,
    "Adam8bit": _adam_8bit,
    "SGD": _sgd,
    "Lion": _lion,
}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, by GPT-NeoX's rule: biases and the parameters of norms do not decay, all other parameters do. An empty group is left out.

    Experts that other processes do not have are in groups of their own, with DeepSpeed's marks.
    """
    exempt = set(_exempt_parameters(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for name in dict.fromkeys([None, *(marks_of(p).group_name for p in parameters)]):
        own = [p for p in parameters if marks_of(p).group_name == name]
        extra = {} if name is None else {"moe": True, "name": name}
        groups.append({"params": [p for p in own if p not in exempt], "weight_decay": weight_decay, **extra})
        groups.append({"params": [p for p in own if p in exempt], "weight_decay": 0.0, **extra})
    return [group for group in groups if group["params"]]


def _exempt_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        is_norm = type(module).__name__.endswith("Norm")
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm or name == "bias" or name.endswith("_bias"):
                yield parameter


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
