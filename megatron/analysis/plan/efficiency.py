"""How much of the data sheet's figures a step reaches. Every number that was fitted or assumed is here, and nothing else is.

`Efficiency` has one set for each kind of software stack. docs/planning.md says on which measured rows they were fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MATMUL = 0.72
"""Share of the 16-bit peak that a large dense product reaches. H100s and A100s reach 0.65 to 0.80 under their power limits."""
ROWS_HALF = 96
"""Rows of one weight with which a product reaches half of that: a tile of a kernel has 64 to 256 rows."""
ATTENTION = 0.45
"""Share of the peak of causal flash attention, forward and backward together (Dao, 2023: 0.5 to 0.73 of an A100 without a mask, 0.35 of an H100)."""
MEMORY = 0.80
"""Share of the memory's rate that a kernel without products reaches."""
LINK_SHARE = 0.75
"""Share of a link's rate that NCCL's collectives reach with large messages."""
LATENCY = {"inside": 8e-6, "between": 20e-6}
"""Seconds for each doubling of a group, inside a node and between nodes."""
RESERVED_GIB = 2.0
"""Memory of CUDA, NCCL and libraries."""
FRAGMENTATION = 1.06
"""What PyTorch's allocator reserves over what is in use."""


@dataclass(frozen=True)
class Efficiency:
    """A software stack. compute: factor on the rate of products and attention. experts: the same, once more, for the products of experts. traffic:
    factor on the bytes of everything else (fusing kernels saves bytes). host_us: microseconds in which the host starts one kernel. overlap: the share
    of the time of weight and gradient messages that is hidden behind computation.
    """

    compute: float
    experts: float
    traffic: float
    host_us: float
    overlap: float
    what: str


STACKS: Mapping[str, Efficiency] = {
    "this": Efficiency(0.90, 0.80, 1.0, 6.0, 0.0, "this program with its CUDA and Triton kernels; never measured on GPUs, so assumed"),
    "megatron-core": Efficiency(1.0, 0.80, 0.7, 4.0, 0.7, "Megatron-Core with Transformer Engine, tuned"),
    "fsdp": Efficiency(0.90, 0.60, 0.7, 6.0, 0.7, "PyTorch FSDP with torch.compile or fused kernels, experts by grouped or batched products"),
    "megablocks": Efficiency(0.90, 0.60, 1.0, 8.0, 0.5, "FSDP without torch.compile, experts by MegaBlocks"),
    "unfused": Efficiency(0.90, 0.50, 1.5, 20.0, 0.0, "GPT-NeoX with experts and LoREs as separate calls that wait for the host, as the StructMoE fork"),
}
