"""What the packages for experts need of the configuration: `kernel_backends: {experts: megablocks}` and `{dispatch: deep_ep}`. Whether a package is
installed and has the device that it needs is checked where the run starts (`launcher/implementations.py`)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.routers import VARYING
from megatron.config.section import Problem

DEEP_EP_WIDTH = 256
"""DeepEP 2.5 adds up tokens in vectors of 8 numbers, 32 at a time."""
DEEP_EP_CHOICES = 32
"""A group of 32 threads of DeepEP looks at a token's experts, one each."""


def package_problems(parallel: ParallelConfig, model: ModelConfig, moe: MoEConfig, precision: str) -> Iterator[Problem]:
    """What the named packages cannot do. A dense model uses none of them."""
    if not moe.has_experts:
        return
    for op, package, does in (("experts", "megablocks", "computes in"), ("dispatch", "deep_ep", "sends")):
        if moe.kernel_backends.get(op) == package and precision != "bfloat16":
            says = f"{does} bfloat16 only, and precision is {precision}; write precision: bfloat16"
            yield Problem((f"kernel_backends.{op}", "precision"), says)
    if moe.kernel_backends.get("dispatch", "auto") not in ("auto", "reference"):
        yield from _dispatch_problems(parallel, model, moe)


def _dispatch_problems(parallel: ParallelConfig, model: ModelConfig, moe: MoEConfig) -> Iterator[Problem]:
    key, instead = "kernel_backends.dispatch", "remove this entry of kernel_backends"
    if parallel.moe_expert_parallel_size == 1:
        says = "sends rows between processes that share the experts; write a moe_expert_parallel_size of 2 or more, or"
        yield Problem((key, "moe_expert_parallel_size"), f"{says} {instead}")
    if moe.kernel_backends["dispatch"] != "deep_ep":
        return
    width, of = (model.hidden_size, "hidden_size") if moe.moe_latent_size is None else (moe.moe_latent_size, "moe_latent_size")
    if width % DEEP_EP_WIDTH:
        yield Problem((key, of), f"needs a {of} that {DEEP_EP_WIDTH} divides, and it is {width}; {instead}")
    most, why = (max(moe.choice_counts), "moe_num_experts") if moe.moe_router_type in VARYING else (moe.top_k, "moe_top_k")
    if most > DEEP_EP_CHOICES:
        yield Problem((key, why), f"sends a token to {DEEP_EP_CHOICES} experts at most, and here it may have {most}; {instead}")
