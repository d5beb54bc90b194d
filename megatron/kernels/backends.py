"""Every op by its name in the config (`kernel_backends`), and the check that what the config asks for can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.kernels import attention, grouped_gemm, grouped_lore, permute, rms_norm, route
from megatron.kernels.registry import KernelUnavailable, Op

OPS: dict[str, Op[Any]] = {
    "attention": attention.OP,
    "grouped_gemm": grouped_gemm.OP,
    "grouped_lore": grouped_lore.OP,
    "permute": permute.OP,
    "rms_norm": rms_norm.OP,
    "route": route.OP,
}


def choose_backends(requested: Mapping[str, str], device: str) -> dict[str, str]:
    """Op -> the implementation that runs on `device`; "auto" for ops that are not named. Raises KernelUnavailable with the reason."""
    for name in requested:
        if name not in OPS:
            raise KernelUnavailable(f"kernel_backends: there is no op '{name}'; known: {', '.join(OPS)}")
    return {name: op.choose(requested.get(name, "auto"), device) for name, op in OPS.items()}
