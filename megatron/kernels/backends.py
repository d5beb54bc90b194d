"""Every op by its name in the config (`kernel_backends`), the check that what the config asks for can run, and what will run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megatron.kernels import attention, decode, dispatch, experts, grouped_gemm, grouped_lore, linear_cross_entropy, permute, rms_norm, route
from megatron.kernels.registry import KernelUnavailable, Op

OPS: dict[str, Op[Any]] = {
    "attention": attention.OP,
    "decode": decode.OP,
    "dispatch": dispatch.OP,
    "experts": experts.OP,
    "grouped_gemm": grouped_gemm.OP,
    "grouped_lore": grouped_lore.OP,
    "linear_cross_entropy": linear_cross_entropy.OP,
    "permute": permute.OP,
    "rms_norm": rms_norm.OP,
    "route": route.OP,
}


class Choice(NamedTuple):
    """What computes a part of a model, and why nothing better does."""

    part: str
    """An op, or what else can be computed in several ways."""
    runs: str
    because: str
    """Empty: it is the best one."""


def check_names(requested: Mapping[str, str]) -> None:
    """Raises KernelUnavailable for an op or an implementation that does not exist."""
    for name, implementation in requested.items():
        if name not in OPS:
            raise KernelUnavailable(f"kernel_backends: there is no op '{name}'; known: {', '.join(OPS)}")
        OPS[name].check_name(implementation)


def choose_backends(requested: Mapping[str, str], device: str, ops: Iterable[str] = OPS) -> list[Choice]:
    """What runs on `device` for each of `ops`; "auto" for ops that are not named. Raises KernelUnavailable with the reason."""
    check_names(requested)
    return [choose(OPS[name], requested.get(name, "auto"), device) for name in ops]


def choose(op: Op[Any], requested: str, device: str) -> Choice:
    """The same for one op."""
    chosen = op.choose(requested, device)
    if requested != "auto":
        return Choice(op.name, chosen, "kernel_backends names it")
    return Choice(op.name, chosen, "; ".join(f"{name}: {reason}" for name, reason in op.better(chosen, device).items()))
