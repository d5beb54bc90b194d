"""The shapes that are measured, and tensors of these shapes.

Shapes: T tokens; K experts per token; R = T*K rows, sorted by expert; E experts; M LoREs per expert; G = E*M; L LoREs per row; Q rank; D in; F out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.kernels.grouped_lore.interface import HiddenLayer, LoreChoice, Projection
from megatron.kernels.permute import Order, sort_by_group
from moe_bench.rooflines import Sizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    """Of one layer."""

    name: str
    tokens: int
    width_in: int
    width_out: int
    experts: int
    top_k: int = 1
    lores: int = 0
    """Of one expert. 0: plain experts."""
    rank: int = 0
    lore_top_k: int = 1
    activation: str = "gelu"
    gated: bool = False

    def sentence(self) -> str:
        """The name with the numbers."""
        lores = f", M={self.lores}, r={self.rank}, l={self.lore_top_k}" if self.lores else ""
        return f"{self.name}: T={self.tokens}, d={self.width_in}, F={self.width_out}, E={self.experts}, K={self.top_k}{lores}"


LARGE = Shape("large", 2048, 1024, 4096, 8, lores=32, rank=64)
LARGE_8K = LARGE._replace(name="large 8k", tokens=8192)
QUICKSTART = Shape("quickstart", 1024, 128, 1024, 4, lores=8, rank=32)
MIXTRAL = Shape("mixtral", 2048, 512, 1024, 8, top_k=2, activation="silu", gated=True)
FULL: list[tuple[Shape, str]] = [(QUICKSTART, "fp32"), *((shape, dtype) for shape in (MIXTRAL, LARGE, LARGE_8K) for dtype in ("fp32", "bf16"))]
QUICK: list[tuple[Shape, str]] = [(QUICKSTART, "fp32"), *((MIXTRAL._replace(tokens=512), dtype) for dtype in ("fp32", "bf16"))]
TINY = [
    (Shape("tiny", 24, 16, 32, 3, lores=2, rank=8), "fp32"),
    (Shape("tiny gated", 24, 16, 32, 3, top_k=2, activation="silu", gated=True), "bf16"),
]
"""For tests."""


class Routed(NamedTuple):
    """What depends on the number of tokens."""

    x_TD: Tensor
    x_RD: Tensor
    h_RF: Tensor
    order: Order
    logit_TE: Tensor
    """Float32, as of a router; so is the next."""
    logit_RM: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    choice: LoreChoice | None
    """None: no LoREs."""
    sizes: Sizes

    @property
    def rows_E(self) -> Tensor:
        """int64."""
        return self.order.rows_G

    @property
    def offsets_E(self) -> Tensor:
        """int32, as `grouped_mm` takes them."""
        return self.rows_E.cumsum(0).to(torch.int32)


@dataclass
class Inputs:
    """Parameters of a shape, made once; what is routed is made for any number of tokens. All are drawn from one seed."""

    shape: Shape
    dtype: torch.dtype
    device: str
    up_EFD: Tensor = field(init=False)
    gate_EFD: Tensor | None = field(init=False)
    down_EFD: Tensor = field(init=False)
    a_GQD: Tensor | None = field(init=False)
    b_GQF: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        self.generator = torch.Generator().manual_seed(0)
        self.up_EFD, self.down_EFD = (self.parameter(s.experts, s.width_out, s.width_in, fan_in=fan) for fan in (s.width_in, s.width_out))
        self.gate_EFD = self.parameter(s.experts, s.width_out, s.width_in, fan_in=s.width_in) if s.gated else None
        lores = s.experts * s.lores
        self.a_GQD = self.parameter(lores, s.rank, s.width_in, fan_in=s.width_in) if lores else None
        self.b_GQF = self.parameter(lores, s.rank, s.width_out, fan_in=s.rank) if lores else None

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Uniform with standard deviation `scale`."""
        values = torch.empty(shape).uniform_(-scale * 3**0.5, scale * 3**0.5, generator=self.generator)
        return values.to(self.device, self.dtype)

    def parameter(self, *shape: int, fan_in: int) -> Tensor:
        """With a gradient, and products of size 1."""
        return self.draw(*shape, scale=fan_in**-0.5).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """Of the hidden layer."""
        return [t for t in (self.up_EFD, self.gate_EFD, self.a_GQD, self.b_GQF) if t is not None]

    def routed(self, tokens: int) -> Routed:
        """Every token draws its experts, every row its LoREs."""
        s = self.shape
        x_TD = self.draw(tokens, s.width_in).requires_grad_()
        logit_TE = torch.randn(tokens, s.experts, generator=self.generator).to(self.device).requires_grad_()
        expert_TK = logit_TE.detach().topk(s.top_k).indices
        order = sort_by_group(expert_TK, s.experts)
        x_RD = x_TD.detach().index_select(0, order.order_R // s.top_k).requires_grad_()
        rows, lore_rows, used_lores, choice = len(x_RD), 0, 0, None
        logit_RM = torch.randn(rows, s.lores, generator=self.generator).to(self.device).requires_grad_()
        if s.lores:
            lore_RL = logit_RM.detach().topk(s.lore_top_k).indices
            owner_R = torch.repeat_interleave(torch.arange(s.experts, device=self.device), order.rows_G)
            lore_order = sort_by_group(lore_RL + owner_R[:, None] * s.lores, s.experts * s.lores)
            pi_RL = torch.rand(rows, s.lore_top_k, generator=self.generator).to(self.device).requires_grad_()
            choice, lore_rows = LoreChoice(pi_RL, lore_order), pi_RL.numel()
            used_lores = int((lore_order.rows_G > 0).sum())
        used_experts, projections = int((order.rows_G > 0).sum()), 2 if s.gated else 1
        used = used_experts, lore_rows, s.rank, used_lores, projections, s.experts, s.experts * s.lores
        sizes = Sizes(rows, s.width_in, s.width_out, *used)
        weight_TK = torch.full((tokens, s.top_k), 1 / s.top_k, device=self.device).requires_grad_()
        h_RF = self.draw(rows, s.width_out).requires_grad_()
        return Routed(x_TD, x_RD, h_RF, order, logit_TE, logit_RM, expert_TK, weight_TK, choice, sizes)

    def layer(self, routed: Routed) -> HiddenLayer:
        """What `grouped_lore` takes."""
        up = Projection(self.up_EFD, self.a_GQD, self.b_GQF)
        gate = None if self.gate_EFD is None else Projection(self.gate_EFD)
        return HiddenLayer(routed.rows_E, self.shape.activation, up, gate, routed.choice)
