"""What the parts of a layer consist of. Shapes as in the package's docstring."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron.kernels.attention.interface import HeadLayout

Kind = Literal["none", "rmsnorm", "layernorm", "activation", "gate"]
KINDS: tuple[Kind, ...] = ("none", "rmsnorm", "layernorm", "activation", "gate")
"""In the order of csrc's numbers."""


class Matrix(NamedTuple):
    """A weight as it lies in memory, [rows, columns]."""

    weight: Tensor
    """float32, bfloat16, or int8."""
    scale: Tensor | None = None
    """float32, one for each row: the numbers are weight * scale. None unless int8."""

    def wide(self) -> Tensor:
        """In float32."""
        return self.weight.float() if self.scale is None else self.weight.float() * self.scale[:, None]


class Input(NamedTuple):
    """What happens to a row before it is multiplied. `gate`: a row [up ; gate] becomes act(gate) * up."""

    kind: Kind = "none"
    scale: Tensor | None = None
    """float32, of a norm. None: 1."""
    shift: Tensor | None = None
    """float32, of a norm. None: 0."""
    epsilon: float = 0.0
    activation: str = "identity"
    """Of `activation` and `gate`: a name of `megatron.kernels.activations`."""


AS_IT_IS = Input()


class Linear(NamedTuple):
    """y = input(x) W^T + bias."""

    matrix: Matrix
    bias: Tensor | None
    """float32. None: 0."""
    input: Input = AS_IT_IS


class Choice(NamedTuple):
    """How the best of some candidates are chosen by their logits, and weighted."""

    candidates: int
    chosen: int
    sigmoid: bool = False
    """The scores are sigmoid(logit). Else they are the softmax over all candidates."""
    normalize: bool = False
    """The weights are divided by their sum."""
    scale: float = 1.0
    bias: Tensor | None = None
    """float32, added to the scores for the choice alone. None: 0."""


class Projection(NamedTuple):
    """A projection of all experts, stacked: y = x W^T + bias, where W is [F, D]. Of the down-projection: y = h W + bias."""

    matrix: Matrix
    bias: Tensor | None = None
    """float32, [E, F] ([E, D] of the down-projection). None: 0."""
    left: Matrix | None = None
    """Of decomposed experts, [E*rank, D]; `matrix` is then [E*F, rank]. None: the matrix is whole."""
    lore_a: Matrix | None = None
    """[E*M*Q, D]. None: there are no LoREs."""
    lore_b: Matrix | None = None
    """[E*M*Q, F]."""


class Lores(NamedTuple):
    """LoREs of all experts: each has `choice.candidates` of them, of rank Q."""

    rank: int
    choice: Choice
    router: Matrix | None
    """[E*M, D]. None: an expert's one LoRE is always on."""


class Experts(NamedTuple):
    """residual + the chosen experts of input(x). `rank`: of decomposed experts, else 0. `lores`: None where there are none."""

    input: Input
    choice: Choice
    router: Matrix | None
    """None: the choice is given."""
    num_experts: int
    up: Projection
    gate: Projection | None
    """None: no gate."""
    down: Projection
    activation: str
    rank: int = 0
    lores: Lores | None = None


class Attention(NamedTuple):
    """Attention of new tokens to what their caches hold."""

    layout: HeadLayout
    window: int | None = None
    """Positions before its own that a token sees. None: all."""
    query_norm: Input = AS_IT_IS
    key_norm: Input = AS_IT_IS
    over_all_heads: bool = False
    """Each norm is over all heads together."""
    cosines: Tensor | None = None
    """float32 [positions, n/2]. None: nothing is turned."""
    sines: Tensor | None = None
    slopes: Tensor | None = None
    """float32 [H]: ALiBi's. None: no bias."""


class Routed(NamedTuple):
    """What the router decided in one call. The tensors belong to the caller."""

    expert_Nk: Tensor
    """int64."""
    weight_Nk: Tensor
    """float32."""
    lore_NkL: Tensor
    """int64: LoREs of each chosen expert; L = 0 where nothing is chosen."""

    @classmethod
    def empty(cls, experts: Experts, rows: int) -> Routed:
        """Room for the decisions of `rows` rows."""
        lores = 0 if experts.lores is None or experts.lores.router is None else experts.lores.choice.chosen
        shape = (rows, experts.choice.chosen)
        return cls(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), torch.zeros(*shape, lores, dtype=torch.int64))
