"""What these tests share: small models on disk, the same model with its experts in slots, and one generation that both run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron.config import config_from_dict
from megatron.config.size import padded_vocab_size
from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.runner import build_runner
from megatron.kernels.precision import DTYPES
from megatron.model.attention import build_cache
from megatron.model.gpt import build_model
from megatron.monitor.routing_trace import Trace, read_trace
from megatron.testing.tiny import TINY_MOE, TINY_STRUCTMOE
from tests.inference.conftest import LIVELY, write_checkpoint

MIXTRAL_LIKE: Mapping[str, Any] = {**TINY_MOE, **LIVELY, "num_layers": 3, "moe_num_experts": 8, "activation": "swiglu", "norm": "rmsnorm"}
STRUCTMOE: Mapping[str, Any] = {**TINY_STRUCTMOE, **LIVELY, "moe_num_experts": 6, "moe_expert_bias": True}
KINDS: dict[str, Mapping[str, Any]] = {
    "plain": {**TINY_MOE, **LIVELY, "moe_num_experts": 8, "moe_expert_bias": True},
    "gated": MIXTRAL_LIKE,
    "gated bf16": {**MIXTRAL_LIKE, "precision": "bfloat16"},
    "decomposed": {**MIXTRAL_LIKE, "moe_expert_type": "decomposed"},
    "structmoe": STRUCTMOE,
    "structmoe one lore": {**STRUCTMOE, "moe_lore_top_k": 1},
    "structmoe both": {**STRUCTMOE, "activation": "swiglu", "moe_lore_projection": "both"},
    "structmoe unrouted": {**STRUCTMOE, "moe_lore_routed": False},
    "segments": {**MIXTRAL_LIKE, "moe_num_experts": 4, "moe_expert_segments": 2, "moe_top_k": 1, "moe_num_shared_experts": 1},
    "by layer": {**MIXTRAL_LIKE, "moe_num_experts": 1, "moe_num_experts_by_layer": [4, 8, 6]},
    "sigmoid": {**MIXTRAL_LIKE, "moe_router_type": "sigmoid"},
    "latent": {**MIXTRAL_LIKE, "moe_latent_size": 16},
    "latent structmoe": {**STRUCTMOE, "moe_latent_size": 16},
    "zero computation": {**MIXTRAL_LIKE, "moe_top_k": 2, "moe_zero_experts": 1, "moe_copy_experts": 1, "moe_constant_experts": 1},
    "smoe_dropout": {**MIXTRAL_LIKE, "moe_router_type": "smoe_dropout", "moe_top_k": 3, "moe_router_start_k": 2},
    "top p": {**MIXTRAL_LIKE, "moe_router_type": "top_p", "moe_top_k": None},
}
PROMPT = list(range(1, 18))


def write_model(directory: Path, keys: Mapping[str, Any], seed: int = 3) -> dict[str, Any]:
    """A checkpoint with new weights, and the keys that load it."""
    config = config_from_dict({key: value for key, value in keys.items() if value is not None})
    vocabulary = padded_vocab_size(CharLevelTokenizer().vocab_size, config.model.make_vocab_size_divisible_by)
    gpt = build_model(config.model, config.moe, vocabulary, seed=seed, dtype=DTYPES[config.precision])
    write_checkpoint(directory, config, gpt)
    return {**{key: value for key, value in keys.items() if value is not None}, "load": str(directory)}


def load(keys: Mapping[str, Any], **offload: Any) -> ReadyModel:
    """Without `offload`: all experts resident."""
    return load_ready_model(config_from_dict({**keys, **({"expert_offload": offload} if offload else {})}))


@torch.inference_mode()
def logits_of(ready: ReadyModel, prompt: list[int] = PROMPT, new: int = 8) -> torch.Tensor:
    """The logits of a prompt's positions and of greedily chosen tokens after it."""
    caches = build_cache(ready.sizes, 1, len(prompt) + new, dtype=ready.dtype)
    tokens, rows = list(prompt), []
    for _ in range(new + 1):
        logits = ready.gpt(torch.tensor([tokens]), cache=caches).logits_BSV
        assert logits is not None
        rows.append(logits[0])
        tokens = [int(logits[0, -1].argmax())]
    return torch.cat(rows)


def record_of(keys: Mapping[str, Any], path: Path, prompt: list[int] = PROMPT, *, new: int) -> Trace:
    """Records the calls of `logits_of`, and reads the file."""
    ready = load(keys, slots=64, record=str(path))
    runner = build_runner(ready)
    state, tokens = runner.open(len(prompt) + new), list(prompt)
    for _ in range(new + 1):
        tokens = [int(runner.prefill(state, tokens).argmax())]
    assert ready.offloaded is not None
    ready.offloaded.finish(Console(file=io.StringIO()))
    return read_trace(path)


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_model(tmp_path_factory.mktemp("gated"), MIXTRAL_LIKE)


@pytest.fixture(scope="session")
def structmoe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_model(tmp_path_factory.mktemp("structmoe"), STRUCTMOE)
