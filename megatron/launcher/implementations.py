"""Which implementations will run on this machine: the check of `kernel_backends`, and the lines that `--check` shows.

PyTorch is imported inside the functions, so that a start without `kernel_backends` does not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.config.loader import LoadedConfig
from megatron.config.neox import NeoXConfig
from megatron.config.section import ConfigError

if TYPE_CHECKING:
    from megatron.kernels.backends import Choice


def check_backends(loaded: LoadedConfig, device: str | None) -> None:
    """Raises ConfigError, with file and line, for an entry of `kernel_backends` that cannot be followed on devices of this type (PyTorch's name).

    None: the processes run on other machines, whose devices are not known here. Only the names are checked then.
    """
    requested = loaded.config.moe.kernel_backends
    if not requested:
        return
    from megatron.kernels.backends import OPS, check_names
    from megatron.kernels.registry import KernelUnavailable

    problems = []
    for name, implementation in requested.items():
        try:
            check_names({name: implementation})
            if device is not None:
                OPS[name].choose(implementation, device)
        except KernelUnavailable as error:
            place = loaded.places.get(f"kernel_backends.{name}") or loaded.places.get("kernel_backends")
            sentence = str(error).partition(": ")[2]  # without the name of the op
            problems.append(f"{f'{place}: ' if place else ''}'kernel_backends.{name}': {sentence}")
    if problems:
        raise ConfigError(problems)


def implementations(config: NeoXConfig, device: str) -> list[Choice]:
    """What computes each part of a training step that can be computed in several ways, and why nothing better does.

    `check_backends` must have found nothing.
    """
    import torch

    from megatron.kernels.precision import DTYPES
    from megatron.model.implementations import choices
    from megatron.training.optimizer import optimizer_choice

    apart, sends = config.data.reset_attention_mask, config.parallel.layout.expert > 1
    parts = choices(config.model, config.moe, torch.device(device), DTYPES[config.precision], apart=apart, sends=sends)
    return [*parts, optimizer_choice(config.optimizer, device)]
