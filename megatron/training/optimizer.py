"""Optimizers over two groups of parameters, with and without weight decay. At ZeRO stage 0 they clip gradients and skip steps that are not finite."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.machine import is_installed
from megatron.config.optimizer import OptimizerConfig
from megatron.training.lion import Lion


class OptimizerUnavailable(ValueError):
    """The configured optimizer needs a package or a device that is missing. The message says which."""


class Skipping(torch.optim.Optimizer):
    """A base class put before an optimizer class. It clips by the global gradient norm, and changes nothing if that norm is not finite.

    It is for ZeRO stage 0, where DeepSpeed itself would write NaN into the weights. DeepSpeed reads `overflow` and `_global_grad_norm` after each
    step.
    Clipping uses the loss scaling of PyTorch's fused kernels (`grad_scale`, `found_inf`), so it needs no extra pass over the gradients.
    """

    def __init__(self, groups: list[dict[str, Any]], *, max_norm: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.max_norm = max_norm
        self.loss_scale = 1.0
        """The gradients are still multiplied by this number."""
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) / self.loss_scale
        self._global_grad_norm = norm.item()
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return None
        self._divide(gradients, self._clip_divisor(norm) * self.loss_scale)
        loss: float | None = super().step(closure)
        return loss

    def _divide(self, gradients: list[Tensor], divisor: Tensor) -> None:
        self.grad_scale = divisor
        self.found_inf = torch.zeros((), dtype=torch.float32, device=divisor.device)

    def _clip_divisor(self, norm: Tensor) -> Tensor:
        """What the gradients are divided by: norm / max_norm where that is above 1."""
        if self.max_norm <= 0:
            return torch.ones((), dtype=torch.float32, device=norm.device)
        return (norm.float() / self.max_norm).clamp(min=1.0)


class SkippingAdam(Skipping, torch.optim.Adam):
    """PyTorch's fused Adam, with decoupled weight decay or without."""


class SkippingSGD(Skipping, torch.optim.SGD):
    """PyTorch's fused SGD."""


class SkippingLion(Skipping, Lion):
    """Our own Lion, which reads `grad_scale`."""


class DividingFirst(Skipping):
    """For an optimizer that cannot divide the gradients: they are divided in place before its step."""

    def _divide(self, gradients: list[Tensor], divisor: Tensor) -> None:
        torch._foreach_div_(gradients, divisor)


def build_optimizer(config: OptimizerConfig, model: nn.Module, device_type: str) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps, for training on a device of this type (PyTorch's name: "cpu", "cuda", ...).

    With ZeRO 1 to 3 DeepSpeed clips and skips steps whose gradients are not finite. At stage 0 the optimizer does both. Raises OptimizerUnavailable.
    """
    groups = parameter_groups(model, config.weight_decay)
    kind, settings = choose_optimizer(config, device_type)
    settings["lr"] = config.optimizer.params.lr
    if config.zero_optimization.stage > 0:
        return kind(groups, **settings)
    return skipping(kind)(groups, max_norm=config.gradient_clipping, **settings)


def skipping(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer with clipping and skipping."""
    built_in = {torch.optim.Adam: SkippingAdam, torch.optim.SGD: SkippingSGD, Lion: SkippingLion}
    return built_in[kind] if kind in built_in else type(f"Skipping{kind.__name__}", (DividingFirst, kind), {})


Choice = tuple[Any, dict[str, Any]]
"""An optimizer class and its settings, without the learning rate."""


def choose_optimizer(config: OptimizerConfig, device_type: str) -> Choice:
    """The configured optimizer class. Raises OptimizerUnavailable for a package that is not installed or cannot run on a device of this type."""
    return KINDS[config.optimizer_type](config, device_type)


def _adam(config: OptimizerConfig, device_type: str) -> Choice:
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


def _adam_8bit(config: OptimizerConfig, device_type: str) -> Choice:
    """Dettmers et al., 2022: the averages in blocks of 8-bit numbers; weight decay is decoupled."""
    if not is_installed("bitsandbytes"):
        raise OptimizerUnavailable(
            "Adam8bit (use_bnb_optimizer: true) needs the package 'bitsandbytes': pip install bitsandbytes, or use Adam "
            "(the version: requirements/requirements-bitsandbytes.txt)"
        )
    return importlib.import_module("bitsandbytes.optim").Adam8bit, config.optimizer_settings


def _sgd(config: OptimizerConfig, device_type: str) -> Choice:
    return torch.optim.SGD, {**config.optimizer_settings, "fused": True}


def _lion(config: OptimizerConfig, device_type: str) -> Choice:
    return Lion, config.optimizer_settings


KINDS: dict[str, Callable[[OptimizerConfig, str], Choice]] = {
    "Adam": _adam,
    "AdamW": _adam,
    "Adam8bit": _adam_8bit,
    "SGD": _sgd,
    "Lion": _lion,
}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, by GPT-NeoX's rule: biases and the parameters of norms do not decay, all other parameters do. An empty group is left out."""
    exempt = set(_exempt_parameters(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p in exempt], "weight_decay": 0.0},
    ]
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
