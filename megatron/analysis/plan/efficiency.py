"""How much of the data sheet's figures a step reaches. Every number that was fitted or assumed is here, and nothing else is.

`Efficiency` has one set for each kind of software stack. docs/planning.md says on which measured rows they were fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MATMUL = 0.76
"""Share of the 16-bit peak that a large dense product reaches. H100s and A100s reach 0.65 to 0.80 under their power limits."""
HALF = 128
"""Rows, or the narrower side of a weight, with which a product reaches half of that: a tile of a kernel has 64 to 256 rows."""
ATTENTION = 0.55
"""Share of the peak of causal flash attention with wide heads, forward and backward together (Dao, 2023: 0.5 to 0.73 of an A100, 0.35 of an H100)."""
HEAD_HALF = 48
"""Width of a head with which attention reaches half of that."""
MEMORY = 0.80
"""Share of the memory's rate that a kernel without products reaches."""
LINK_SHARE = 0.65
"""Share of a link's rate that NCCL's collectives reach with large messages."""
LATENCY = {"inside": 8e-6, "between": 20e-6}
"""Seconds for each doubling of a group, inside a node and between nodes."""
RESERVED_GIB = 2.0
"""Memory of CUDA, NCCL and libraries."""
FRAGMENTATION = 1.06
"""What PyTorch's allocator reserves over what is in use."""


FUSED_TRAFFIC = 0.85
"""What fusing kernels (torch.compile, Transformer Engine) leaves of the bytes of everything that is no product."""
OVERLAP = 0.7
"""The share of the time of weight and gradient messages that a stack hides behind computation, if it does so at all."""


@dataclass(frozen=True)
class Efficiency:
    """A software stack. compute: factor on the rate of products and attention. experts: the same, once more, for the products of experts. host_us:
    microseconds in which the host starts one kernel. fused, overlaps: what the two constants above are about.
    """

    compute: float
    experts: float
    host_us: float
    fused: bool
    overlaps: bool
    what: str

    @property
    def traffic(self) -> float:
        """Factor on the bytes of what is no product."""
        return FUSED_TRAFFIC if self.fused else 1.0

    @property
    def hidden(self) -> float:
        """Share of the time of weight and gradient messages that costs nothing."""
        return OVERLAP if self.overlaps else 0.0


STACKS: Mapping[str, Efficiency] = {
    "this": Efficiency(
        0.9, 0.7, 6.0, False, False, "this program with its CUDA and Triton kernels. It never ran on a GPU: these numbers are assumed"
    ),
    "megatron-core": Efficiency(1.0, 0.9, 5.0, True, True, "Megatron-Core with Transformer Engine, tuned by its authors"),
    "fsdp": Efficiency(0.9, 0.19, 6.0, True, True, "PyTorch FSDP with torch.compile; experts as padded batched products"),
    "fsdp-grouped": Efficiency(0.9, 0.7, 6.0, True, True, "PyTorch FSDP with torch.compile; experts by tuned grouped kernels"),
    "megablocks": Efficiency(0.9, 0.45, 75.0, False, True, "PyTorch FSDP without torch.compile, experts by MegaBlocks"),
    "unfused": Efficiency(
        0.4, 0.3, 65.0, False, False, "GPT-NeoX with experts and LoREs as calls that wait for the host (the StructMoE authors' fork)"
    ),
}
