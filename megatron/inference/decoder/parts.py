"""From the modules of a model to the parts that decoding's kernels compute. Weights are shared, not copied, unless they are stored in another format.

Shapes as in `megatron/kernels/decode`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron.kernels.attention.interface import HeadLayout
from megatron.kernels.decode.interface import AS_IT_IS, Attention, Choice, Experts, Input, Linear, Lores, Matrix, Projection
from megatron.kernels.route import Selection
from megatron.model.activations import kernel_activation
from megatron.model.attention.self_attention import SelfAttention
from megatron.model.attention.split import NormedRotarySplit, NormedSplit, PlainSplit, RotarySplit
from megatron.model.mlp import MLP, GatedMLP
from megatron.model.moe.experts.decomposed import DecomposedExperts, GatedDecomposedMLP
from megatron.model.moe.experts.grouped import GatedExpertMLP, GroupedExperts
from megatron.model.moe.experts.structmoe import BothEntangledGatedExperts, GateEntangledGatedExperts, LoREs, StructMoEExperts, UnroutedLoREs
from megatron.model.moe.routers.document_pool import DocumentPoolRouter
from megatron.model.moe.routers.sigmoid import SigmoidRouter
from megatron.model.moe.routers.sinkhorn import SinkhornRouter
from megatron.model.moe.routers.smoe_dropout import SMoEDropoutRouter
from megatron.model.moe.routers.topk import TopKRouter
from megatron.model.norms import LayerNorm, RMSNorm
from megatron.model.positions.rotary import rotary_table

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig

Store = Callable[[Tensor], Matrix]
"""How a weight is kept: as it is, or in int8."""


class NotServed(Exception):
    """Why the kernels cannot serve a module."""


def norm_part(norm: nn.Module) -> Input:
    """A norm as what happens to a row before it is multiplied."""
    if isinstance(norm, RMSNorm) and norm.scale.ndim == 1:
        return Input("rmsnorm", _float(norm.scale), None, norm.epsilon)
    if isinstance(norm, LayerNorm) and len(norm.normalized_shape) == 1:
        return Input("layernorm", _float(norm.weight), _float(norm.bias), norm.eps)
    raise NotServed(f"a norm of the kind {type(norm).__name__} over {_shape(norm)} dimensions")


def linear_part(layer: nn.Linear, store: Store, given: Input = AS_IT_IS) -> Linear:
    """A linear layer, and what happens to its input."""
    return Linear(store(layer.weight), _float(layer.bias), given)


def mlp_parts(mlp: nn.Module, model: ModelConfig, store: Store, norm: Input) -> tuple[Linear, Linear]:
    """The two products of a dense MLP."""
    if type(mlp) not in (MLP, GatedMLP):
        raise NotServed(f"an MLP of the kind {type(mlp).__name__}")
    activated = Input("gate" if type(mlp) is GatedMLP else "activation", activation=kernel_activation(model.hidden_function))
    return linear_part(mlp.linear1, store, norm), linear_part(mlp.linear2, store, activated)  # type: ignore[arg-type]


def attention_part(attention: SelfAttention, model: ModelConfig) -> Attention:
    """What attention does between its two linear layers."""
    split = attention.split
    if type(split) not in (PlainSplit, RotarySplit, NormedSplit, NormedRotarySplit) or attention.qk_layernorm is not None:
        raise NotServed("norms with weights of their own for each head (use_qk_layernorm)")
    if attention.rpe is not None:
        raise NotServed("relative positions (pos_emb: rpe)")
    norms = [AS_IT_IS if norm is None else norm_part(norm) for norm in (attention.q_norm, attention.k_norm)]
    cosines, sines = None, None
    if isinstance(split, RotarySplit | NormedRotarySplit):
        cosines, sines = rotary_table(split.rotary.positions, split.rotary.frequencies, torch.device("cpu"))
    slopes = None
    if attention.alibi_embed is not None:
        slopes = torch.tensor(attention.alibi_embed.values, dtype=torch.float32) * model.position_bias_coefficient(attention.index)
    return Attention(HeadLayout(*attention.layout), model.sliding_window_width, norms[0], norms[1], model.qk_norm_all_heads, cosines, sines, slopes)


def choice_part(router: nn.Module) -> Choice:
    """How a router chooses when it does not train. Its logits are the product with `router.layer.weight`."""
    if isinstance(router, TopKRouter):
        return _selected(router.selection, len(router.layer.weight))
    if isinstance(router, SinkhornRouter):
        return Choice(len(router.layer.weight), router.top_k, sigmoid=router.top_k == 1)
    if isinstance(router, SigmoidRouter) and router.groups is None:
        return Choice(len(router.layer.weight), router.top_k, True, router.normalize, router.scale, router.balance.bias)
    if isinstance(router, DocumentPoolRouter):  # of all experts: `decodes_alone`
        return Choice(len(router.layer.weight), router.top_k, False, router.normalize, router.scale)
    if isinstance(router, SMoEDropoutRouter):
        return Choice(len(router.layer.weight), int(router.chosen), normalize=True)
    raise NotServed(f"the choice of a {type(router).__name__}")


def experts_part(experts: nn.Module, store: Store, choice: Choice, router: Matrix | None, norm: Input) -> Experts:
    """The experts behind a router. `router`: None if the choice is given."""
    of_kind: Any = experts
    if type(experts) is DecomposedExperts:
        up, gate, down, rank, lores = *_decomposed(of_kind.mlp, store), of_kind.mlp.rank, None
    elif type(experts) in (GroupedExperts, StructMoEExperts, GateEntangledGatedExperts, BothEntangledGatedExperts):
        lores = _lores(of_kind.lores) if isinstance(experts, StructMoEExperts) else None
        factors = of_kind.entangled() if isinstance(experts, StructMoEExperts) else {}
        mlp, rank = of_kind.mlp, 0
        up = _projection(mlp.w1, mlp.b1, store, factors.get("up"))
        gate = _projection(mlp.w3, mlp.b3, store, factors.get("gate")) if isinstance(mlp, GatedExpertMLP) else None
        down = _projection(mlp.w2, mlp.b2, store)
    else:
        raise NotServed(f"experts of the kind {type(experts).__name__}")
    return Experts(norm, choice, router, of_kind.num_experts, up, gate, down, of_kind.mlp.activation, rank, lores)


def _decomposed(mlp: Any, store: Store) -> tuple[Projection, Projection | None, Projection]:
    up = Projection(store(mlp.w1_right), _float(mlp.b1.values()), store(mlp.w1_left))
    gated = isinstance(mlp, GatedDecomposedMLP)
    gate = Projection(store(mlp.w3_right), _float(mlp.b3.values()), store(mlp.w3_left)) if gated else None
    return up, gate, Projection(store(mlp.w2_left), _float(mlp.b2.values()), store(mlp.w2_right))


def _projection(weight: Tensor, bias: Any, store: Store, factors: tuple[Tensor, Tensor] | None = None) -> Projection:
    if factors is None:
        return Projection(store(weight), _float(bias.values()))
    a_GQD, b_GQF = factors
    return Projection(store(weight), _float(bias.values()), None, store(a_GQD.flatten(0, 1)), store(b_GQF.flatten(0, 1)))


def _lores(lores: LoREs) -> Lores:
    if isinstance(lores, UnroutedLoREs):
        return Lores(lores.rank, Choice(1, 1), None)
    return Lores(lores.rank, _selected(lores.selection, lores.per_expert), Matrix(lores.router.detach()))


def _selected(selection: Selection, candidates: int) -> Choice:
    return Choice(candidates, selection.top_k, normalize=selection.normalize, scale=selection.scale)


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().float().contiguous()


def _shape(norm: nn.Module) -> str:
    return " x ".join(str(size) for size in next(iter(norm.parameters())).shape) or "no"
