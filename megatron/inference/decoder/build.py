"""From a model to the steps that decode it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.inference.decoder.parts import NotServed, Store, attention_part, choice_part, experts_part, linear_part, mlp_parts, norm_part
from megatron.inference.decoder.steps import (
    AttentionStep,
    CompiledAttention,
    CompiledExperts,
    CompiledMLP,
    FeedForward,
    ModuleAttention,
    ModuleFeedForward,
    ModuleRouted,
    OffloadedExperts,
    Parallel,
    Reordered,
    Sequential,
    SharedMLP,
)
from megatron.inference.offload.experts import SlottedExperts
from megatron.kernels.decode import compiled
from megatron.kernels.decode.interface import AS_IT_IS, Choice, Input, Linear, Matrix
from megatron.model import GPT
from megatron.model.layer import ParallelResidualLayer, ReorderedNormLayer, TiedParallelResidualLayer, TransformerLayer
from megatron.model.moe.latent import LatentProjection
from megatron.model.moe.layer import MoELayer
from megatron.model.moe.routing import looks_at_later_tokens
from megatron.model.moe.shared import GatedSharedExpert, SharedExpert

log = logging.getLogger(__name__)
SERVED = (torch.float32, torch.bfloat16)


@dataclass
class Decoder:
    """The steps of a model."""

    embed: Callable[..., Tensor]
    layers: list[Sequential]
    head: compiled.Linear
    """With the final norm, for the tokenizer's vocabulary alone."""
    modules: dict[str, int]
    """What the kernels do not serve -> in how many layers."""


def build_decoder(gpt: GPT, model: ModelConfig, vocabulary: int, store: Store) -> Decoder:
    """The steps of a whole model on the CPU. `store` says how weights are kept. Raises NotServed where nothing can be done."""
    check_served(gpt)
    builder = _Builder(model, store)
    layers = [builder.layer(layer, index) for index, layer in enumerate(gpt.layers)]
    tied = str(model.num_layers + 4) not in gpt.sequential
    parts: Any = gpt.sequential
    words = parts["0"].word_embeddings.weight if tied else parts[str(model.num_layers + 4)].final_linear.weight
    head = compiled.Linear(Linear(store(words[:vocabulary]), None, norm_part(parts[str(model.num_layers + 3)].norm)))
    return Decoder(parts["0"], layers, head, builder.modules)


def check_served(gpt: GPT) -> None:
    """Raises NotServed for a model whose whole the kernels cannot serve."""
    if not (gpt.is_first and gpt.is_last) or gpt.region.group.size > 1:
        raise NotServed("a model that several processes share")
    weight = next(gpt.parameters())
    if weight.device.type != "cpu" or weight.dtype not in SERVED:
        raise NotServed(f"weights in {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}")
    if looks_at_later_tokens(gpt):
        raise NotServed("experts that choose among the tokens of a call: other texts in the same call would change the choice")
    if any(not getattr(module, "decodes_alone", True) for module in gpt.modules()):
        raise NotServed("routers that look at other layers or at the text before the token")
    parts: Any = gpt.sequential
    for norm in (parts[str(gpt.num_layers + 3)].norm, *(n for layer in gpt.layers if isinstance(layer, ReorderedNormLayer) for n in _norms(layer))):
        norm_part(norm)


def _norms(layer: TransformerLayer) -> tuple[nn.Module, nn.Module]:
    return layer.input_layernorm, layer.post_attention_layernorm


class _Builder:
    """Builds layer by layer, and counts what the model's own modules compute."""

    def __init__(self, model: ModelConfig, store: Store) -> None:
        self.model, self.store = model, store
        self.modules: dict[str, int] = {}

    def layer(self, layer: TransformerLayer, index: int) -> Sequential:
        """The steps of one layer."""
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        if isinstance(layer, ReorderedNormLayer):
            norms = (norm_part(before), norm_part(after))
            nothing = nn.Identity()
            return Reordered(self._attention(layer, nothing, index), self._feed_forward(layer.mlp, nothing), norms)
        attention = self._attention(layer, before, index)
        feed_forward = self._feed_forward(layer.mlp, before if isinstance(layer, TiedParallelResidualLayer) else after)
        return (Parallel if isinstance(layer, ParallelResidualLayer) else Sequential)(attention, feed_forward)

    def _attention(self, layer: TransformerLayer, norm: nn.Module, index: int) -> AttentionStep:
        module = layer.attention
        try:
            fused = linear_part(module.query_key_value, as_it_lies, _normed(norm))
            part = attention_part(module, self.model)
        except NotServed as error:
            self._count(error)
            return ModuleAttention(norm, module, index)
        fused = fused._replace(matrix=self.store(module.query_key_value.weight))
        dense = linear_part(module.dense, self.store)
        return CompiledAttention(compiled.Linear(fused), compiled.Attention(part, module.dense.weight.dtype), compiled.Linear(dense), index)

    def _feed_forward(self, mlp: nn.Module, norm: nn.Module) -> FeedForward:
        try:
            given = _normed(norm)
            if isinstance(mlp, MoELayer):
                return self._experts(mlp, given)
            return self._mlp(mlp, given)
        except NotServed as error:
            self._count(error)
            return ModuleFeedForward(norm, mlp)

    def _mlp(self, mlp: nn.Module, given: Input) -> CompiledMLP:
        mlp_parts(mlp, self.model, as_it_lies, given)  # before any weight is stored in another format
        return CompiledMLP(*(compiled.Linear(part) for part in mlp_parts(mlp, self.model, self.store, given)))

    def _experts(self, layer: MoELayer, given: Input) -> CompiledExperts:
        if isinstance(layer.latent, LatentProjection):
            raise NotServed("a latent projection around the experts")
        if layer.zero_computation.count:
            raise NotServed("zero, copy and constant experts")
        for beside in layer.beside:
            if type(beside) not in (SharedExpert, GatedSharedExpert):
                raise NotServed(f"a {type(beside).__name__} beside the experts")
        slotted = layer.experts if type(layer.experts) is SlottedExperts else None
        experts = layer.experts if slotted is None else slotted.slab
        choice, router = self._choice(layer.router)
        if slotted is not None and router is None:
            raise NotServed(f"offloaded experts behind a {type(layer.router).__name__}")
        experts_part(experts, as_it_lies, choice, router, given)  # before any weight is stored in another format
        store = as_it_lies if slotted is not None else self.store
        compute = compiled.Experts(experts_part(experts, store, choice, router, given))
        shared = [self._shared(beside, given) for beside in layer.beside]
        if slotted is not None:
            return OffloadedExperts(compute, shared, slotted)
        return CompiledExperts(compute, shared) if router is not None else ModuleRouted(compute, shared, layer.router)

    def _choice(self, router: Any) -> tuple[Choice, Matrix | None]:
        """(The rule, the router's matrix; None if the model's own router chooses.)"""
        try:
            return choice_part(router), Matrix(router.layer.weight.detach())
        except NotServed as error:
            if not hasattr(router, "top_k"):  # it chooses a number of experts that depends on the token
                raise
            self._count(error)
            return Choice(len(router.layer.weight), router.top_k), None

    def _shared(self, beside: Any, given: Input) -> SharedMLP:
        gate = Linear(Matrix(beside.gate.weight.detach()), None, given) if isinstance(beside, GatedSharedExpert) else None
        return SharedMLP(self._mlp(beside.mlp, given), None if gate is None else compiled.Linear(gate))

    def _count(self, error: NotServed) -> None:
        self.modules[str(error)] = self.modules.get(str(error), 0) + 1


def _normed(norm: nn.Module) -> Input:
    return AS_IT_IS if isinstance(norm, nn.Identity) else norm_part(norm)


def as_it_lies(weight: Tensor) -> Matrix:
    """A weight as it lies in memory."""
    return Matrix(weight.detach())
