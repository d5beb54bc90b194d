"""What these tests share: a tiny model in memory, and the same one as a checkpoint in NeoX's layout, written without an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.layout import tag
from megatron.checkpoint.save import resolved_config_document
from megatron.config.neox import NeoXConfig
from megatron.config.size import padded_vocab_size
from megatron.data.tokenizer import Tokenizer
from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.inference.continuation import sample_generator
from megatron.inference.engine import Engine, Event, Request
from megatron.inference.model import ReadyModel
from megatron.inference.runner import ModuleRunner
from megatron.inference.sampling import Sampling
from megatron.model.gpt import GPT, build_model
from megatron.testing.tiny import TINY_DENSE, TINY_STRUCTMOE, tiny_config
from megatron.training.setup import checkpoint_args

# Weights large enough that the next token depends on all that was read.
LIVELY = {"init_method_std": 0.3, "seq_length": 32, "max_position_embeddings": 48, "tokenizer_type": "CharLevelTokenizer"}
GREEDY = Sampling()


class NoEndTokenizer(CharLevelTokenizer):
    """A tokenizer whose vocabulary has no end-of-document token."""

    eod = None  # type: ignore[assignment]


def lively_config(base: Mapping[str, Any] = TINY_STRUCTMOE, **overrides: Any) -> NeoXConfig:
    return tiny_config({**base, **LIVELY}, **overrides)


def build_ready(config: NeoXConfig, tokenizer: Tokenizer | None = None, dtype: torch.dtype = torch.float32) -> ReadyModel:
    """A model with fresh weights, ready to run."""
    tokenizer = tokenizer or CharLevelTokenizer()
    vocabulary = padded_vocab_size(tokenizer.vocab_size, config.model.make_vocab_size_divisible_by)
    gpt = build_model(config.model, config.moe, vocabulary, seed=3, dtype=dtype).eval().requires_grad_(False)
    return ReadyModel(gpt, tokenizer, config.model, torch.device("cpu"), Path("global_step2"), 2)


def write_checkpoint(directory: Path, config: NeoXConfig, gpt: GPT, iteration: int = 2) -> Path:
    """The files that a run of one process at ZeRO 0 leaves, without a manifest."""
    path = directory / tag(iteration)
    (path / "configs").mkdir(parents=True)
    vocabulary = gpt.state_dict()["sequential.0.word_embeddings.weight"].shape[0]
    content = {"module": gpt.state_dict(), "dp_world_size": 1, "iteration": iteration, "args": checkpoint_args(config, vocabulary)}
    torch.save(content, path / "mp_rank_00_model_states.pt")
    for name, text in resolved_config_document(config.flat()).items():
        (path / "configs" / name).write_text(text)
    (directory / "latest").write_text(path.name)
    return path


@pytest.fixture(scope="session")
def ready() -> ReadyModel:
    return build_ready(lively_config())


@pytest.fixture(scope="session", params=["rotary", "learned", "grouped-query"])
def any_ready(request: pytest.FixtureRequest) -> ReadyModel:
    """Dense models with each kind of position, and a StructMoE with fewer key/value heads than query heads."""
    if request.param == "grouped-query":
        return build_ready(lively_config(num_kv_heads=2))
    return build_ready(lively_config(TINY_DENSE, pos_emb=request.param))


@pytest.fixture
def checkpoint(tmp_path: Path, ready: ReadyModel) -> dict[str, Any]:
    """The keys of a configuration whose `load` holds `ready` as a checkpoint."""
    write_checkpoint(tmp_path / "run", lively_config(), ready.gpt)
    return {**TINY_STRUCTMOE, **LIVELY, "load": str(tmp_path / "run")}


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Writes keys as a configuration file."""

    def write(keys: Mapping[str, Any]) -> Path:
        path = tmp_path / "config.yml"
        path.write_text(json.dumps(dict(keys)))
        return path

    return write


def engine_of(ready: ReadyModel, maximum_requests: int = 1) -> Engine:
    return Engine(ready, ModuleRunner(ready), maximum_requests=maximum_requests)


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """The tokens of requests that are submitted together."""
    events = run(engine, [engine.submit(request) for request in requests])
    return [[event.token for event in of if event.token is not None] for of in events]


def run(engine: Engine, numbers: Sequence[int]) -> list[list[Event]]:
    """The events of each request until all have ended."""
    events: dict[int, list[Event]] = {number: [] for number in numbers}
    while engine.busy:
        for event in engine.step():
            events[event.request].append(event)
    return list(events.values())


def asked(
    prompt: Sequence[int], maximum_tokens: int, sampling: Sampling = GREEDY, *, seed: int = 0, stop: tuple[str, ...] = (), logprobs: int | None = None
) -> Request:
    return Request(prompt, sampling, maximum_tokens, sample_generator(seed, 0), stop, logprobs)


def argmax_without_cache(ready: ReadyModel, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy continuation by its definition: the whole text through the model for every token."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits_BSV = ready.gpt(torch.tensor([tokens])).logits_BSV
        tokens.append(int(logits_BSV[0, -1, : ready.tokenizer.vocab_size].argmax()))
    return tokens[len(prompt) :]
