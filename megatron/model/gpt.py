"""The language model: a list of layers under NeoX's names, so that its state dictionary is NeoX's on-disk layout without pipelining.

Shapes: B batch; S sequence; D model width; V padded vocabulary; A auxiliary losses; X MoE layers; E experts; G LoREs of a layer.

    sequential.0            embedding            sequential.{L+3}    final norm
    sequential.2 to L+1     transformer layers   sequential.{L+4}    head, where it is not tied to the embedding
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.kernels.backends import choose_backends
from megatron.model.attention import LayerCache
from megatron.model.embedding import Embedding, FinalLinear, Targets, project
from megatron.model.initialization import Initializer, build_initializer
from megatron.model.layer import TransformerLayer, build_layer
from megatron.model.norms import build_norm
from megatron.model.state import LayerState

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig

FIRST_LAYER = 2


class InputError(ValueError):
    """Tokens, labels, mask or cache that do not fit the model or each other."""


class GPTOutput(NamedTuple):
    """What one forward gives."""

    loss: Tensor | None
    """lm_loss plus the auxiliary losses times their coefficients; None without labels."""
    lm_loss: Tensor | None
    """Mean cross entropy, weighted by the loss mask; None without labels."""
    logits_BSV: Tensor | None
    """None with labels: the loss is computed without holding them."""
    aux_losses_A: Tensor
    """float32, unweighted, summed over the MoE layers, in the order of `moe_losses`."""
    expert_load_XE: Tensor
    """int64: tokens sent to each expert."""
    lore_load_XG: Tensor
    """int64: tokens sent to each LoRE; (X, 0) without LoREs."""
    token_loss_BS: Tensor | None
    """Cross entropy of each token, without mask and gradient; None without labels."""


class FinalNorm(nn.Module):
    """The norm before the head, under NeoX's name."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.norm = build_norm(model)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Same shape."""
        return self.norm(hidden_BSD)


class GPT(nn.Module):
    """Embedding, layers, norm, head."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, padded_vocab_size: int, init: Initializer) -> None:
        super().__init__()
        self.num_layers, self.max_positions, self.vocab_size = model.num_layers, model.max_position_embeddings, padded_vocab_size
        self.coefficients = tuple(moe.moe_losses.values())
        self.num_experts = moe.moe_num_experts
        parts: dict[str, nn.Module] = {"0": Embedding(model, padded_vocab_size, init)}
        parts |= {str(FIRST_LAYER + i): build_layer(model, moe, i, init) for i in range(model.num_layers)}
        parts[str(model.num_layers + 3)] = FinalNorm(model)
        if model.no_weight_tying:
            parts[str(model.num_layers + 4)] = FinalLinear(model, padded_vocab_size, init)
        self.sequential = nn.ModuleDict(parts)
        experts = [layer.mlp.experts for layer in self.layers if layer.has_experts]
        self.num_lores = getattr(experts[0], "num_lores", 0) if experts else 0
        self.recompute_layers = 0

    @property
    def layers(self) -> list[TransformerLayer]:
        """The transformer layers in order."""
        return [self.sequential[str(FIRST_LAYER + i)] for i in range(self.num_layers)]  # type: ignore[misc]

    def enable_activation_checkpointing(self, num_layers: int = 1) -> None:
        """In training keep only the inputs of each group of `num_layers` layers and compute the rest again in the backward."""
        if num_layers < 1:
            raise InputError(f"checkpoint_num_layers = {num_layers}: must be at least 1")
        self.recompute_layers = num_layers

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        labels_BS: Tensor | None = None,
        loss_mask_BS: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> GPTOutput:
        """Losses with labels, logits without. With a cache (one entry a layer) the tokens continue those that it holds, and are added to it."""
        position = 0 if not cache else cache[0].length
        self._check(tokens_BS, labels_BS, loss_mask_BS, cache, position)
        hidden_BSD = self.sequential["0"](tokens_BS, position)
        state = LayerState.start(hidden_BSD, num_losses=len(self.coefficients), num_experts=self.num_experts, num_lores=self.num_lores)
        state = self._run_layers(state, cache)
        hidden_BSD = self.sequential[str(self.num_layers + 3)](state.hidden_BSD)
        losses = (state.aux_losses_A, state.expert_load_XE, state.lore_load_XG)
        if labels_BS is None:
            return GPTOutput(None, None, self._head(hidden_BSD, None)[0], *losses, None)
        lm_loss, token_loss_BS = self._head(hidden_BSD, Targets(labels_BS, loss_mask_BS))
        loss = lm_loss
        for coefficient, aux_loss in zip(self.coefficients, state.aux_losses_A.unbind(), strict=True):
            loss = loss + coefficient * aux_loss
        return GPTOutput(loss, lm_loss, None, *losses, token_loss_BS)

    def _head(self, hidden_BSD: Tensor, targets: Targets | None) -> tuple[Tensor, ...]:
        key = str(self.num_layers + 4)
        if key in self.sequential:
            return self.sequential[key](hidden_BSD, targets)
        return project(hidden_BSD, cast(Embedding, self.sequential["0"]).word_embeddings.weight, targets)

    def _run_layers(self, state: LayerState, cache: Sequence[LayerCache] | None) -> LayerState:
        if self.recompute_layers and self.training and cache is None and torch.is_grad_enabled():
            layers = self.layers
            for begin in range(0, len(layers), self.recompute_layers):
                state = checkpoint(_chain(layers[begin : begin + self.recompute_layers]), state, use_reentrant=False)
            return state
        for i, layer in enumerate(self.layers):
            state = layer(state, None if cache is None else cache[i])
        return state

    def _check(
        self, tokens_BS: Tensor, labels_BS: Tensor | None, loss_mask_BS: Tensor | None, cache: Sequence[LayerCache] | None, position: int
    ) -> None:
        shape = tuple(tokens_BS.shape)
        if len(shape) != 2 or 0 in shape or tokens_BS.is_floating_point():
            raise InputError(f"tokens of shape {shape} and dtype {tokens_BS.dtype}: must be integers [batch, sequence], neither empty")
        if position + shape[1] > self.max_positions:
            raise InputError(f"{position} + {shape[1]} tokens: the model has positions for {self.max_positions} (max_position_embeddings)")
        for name, given in (("labels", labels_BS), ("loss mask", loss_mask_BS)):
            if given is not None and tuple(given.shape) != shape:
                raise InputError(f"{name} of shape {tuple(given.shape)}: must have the tokens' shape {shape}")
        if cache is not None and len(cache) != self.num_layers:
            raise InputError(f"a cache of {len(cache)} layers: the model has {self.num_layers}; make it with build_cache")


def build_model(
    model: ModelConfig,
    moe: MoEConfig,
    padded_vocab_size: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> GPT:
    """A model with fresh weights: drawn in float32 on the CPU from `seed` alone, then moved, so they are the same everywhere.

    Raises KernelUnavailable where an implementation that `kernel_backends` names cannot run on `device`.
    """
    choose_backends(moe.kernel_backends, torch.device(device).type)
    return GPT(model, moe, padded_vocab_size, build_initializer(model, seed)).to(device=device, dtype=dtype)


def _chain(layers: list[TransformerLayer]) -> Callable[[LayerState], LayerState]:
    """The layers as one function."""

    def run(state: LayerState) -> LayerState:
        for layer in layers:
            state = layer(state)
        return state

    return run
