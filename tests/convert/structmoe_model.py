"""A model of ours and the same one as a StructMoEForCausalLM, with weights that leave nothing hidden: what the tests of that class start from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.names import is_derived
from megatron.config import NeoXConfig
from megatron.convert.architecture import Source
from megatron.convert.architectures.structmoe import StructMoE
from megatron.convert.huggingface.configuration_structmoe import StructMoEConfig
from megatron.convert.huggingface.modeling_structmoe import StructMoEForCausalLM
from megatron.convert.mapping import to_theirs
from megatron.convert.shapes import checked_read, model_shapes
from megatron.model import GPT, build_model
from megatron.testing.tiny import tiny_config

VOCAB, LENGTH = 56, 64
ROOMY = {"max_position_embeddings": 96, "seq_length": LENGTH, "init_method_std": 0.25, "output_layer_init_method": "normal"}


class Pair(NamedTuple):
    """The same model twice."""

    source: Source
    ours: GPT
    state: dict[str, Tensor]
    """Our weights, without what follows from the configuration."""
    theirs: StructMoEForCausalLM


def lively(gpt: GPT) -> None:
    """Random biases and norms, so that none of them is without effect."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in gpt.state_dict().items():
        if (tensor.dim() == 1 and not is_derived(name)) or "norm" in name or name.endswith(".bias"):
            tensor.add_(torch.empty_like(tensor).normal_(0, 0.2, generator=generator))


def our_model(config: NeoXConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """A model of the configuration with weights that matter."""
    gpt = build_model(config.model, config.moe, VOCAB, seed=3, dtype=dtype).eval()
    lively(gpt)
    return gpt


def pair(*, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Pair:
    """Ours from `tiny_config` with `changes`, and what the table makes of it, loaded strictly."""
    config = tiny_config(**{**ROOMY, **changes})
    source = Source(config, VOCAB)
    gpt = our_model(config, dtype)
    state = {name: tensor for name, tensor in gpt.state_dict().items() if not is_derived(name)}
    architecture = StructMoE()
    model = StructMoEForCausalLM(StructMoEConfig(**architecture.settings(source), attn_implementation=attention)).to(dtype).eval()
    read = checked_read(state.__getitem__, model_shapes(source))
    weights = {named.name: named.tensor for named in to_theirs(architecture.table(source), read)}
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    return Pair(source, gpt, state, model)


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Random tokens."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
