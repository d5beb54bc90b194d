"""Greedy generation gives the tokens that transformers gives with the exported model: every architecture, 64 tokens after each of 20 prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron.convert.to_huggingface import Exported
from megatron.inference.continuation import sample_generator
from megatron.inference.engine import Engine, Request
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.runner import build_runner
from megatron.inference.sampling import Sampling
from tests.convert.models import BASE, CASES, DECODER, EXPERTS, config_of, lively_model, save_model

LENGTHS = (1, 5, 11, 16)
TIE = 1e-4
"""Two logits that are closer than this may change places by rounding."""
LORES = {**EXPERTS, "moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_top_k": 2, "moe_lore_rank": 4}
STRUCTMOE: dict[str, dict[str, Any]] = {
    "structmoe": LORES,
    "structmoe-alibi": {**LORES, "pos_emb": "alibi", "num_kv_heads": 2},
    "structmoe-rpe-window": {**LORES, "pos_emb": "rpe", "sliding_window_width": 12},
    "structmoe-learned": {**BASE, "pos_emb": "learned", "moe_num_experts": 4, "moe_top_k": 1, "moe_router_type": "topk"},
    "dense-sinusoidal": {**DECODER, "pos_emb": "sinusoidal"},
}
MODELS = {name: keys for name, (_, keys) in CASES.items()} | STRUCTMOE
USUAL = ("mistral-window", "mixtral", "structmoe")
"""These are tried always, with fewer and shorter answers."""


class Endless:
    """A tokenizer whose texts have no end."""

    eod = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def prompts(vocabulary: int, of_a_length: int) -> list[Tensor]:
    """For each length a batch of prompts."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(vocabulary, (of_a_length, length), generator=generator) for length in LENGTHS]


def theirs(directory: Path, prompt_BS: Sequence[Tensor], vocabulary: int, tokens: int) -> tuple[Any, list[list[int]]]:
    """(the model, its answer to each prompt)."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        suppress_tokens=list(range(vocabulary, model.config.vocab_size)) or None,
    )
    answers = [model.generate(batch, attention_mask=torch.ones_like(batch))[:, batch.shape[1] :].tolist() for batch in prompt_BS]
    return model, [answer for batch in answers for answer in batch]


def ours(ready: ReadyModel, texts: Sequence[Sequence[int]], tokens: int, *, at_once: int) -> list[list[int]]:
    engine = Engine(ready, build_runner(ready), maximum_requests=at_once)
    answers: dict[int, list[int]] = {
        engine.submit(Request(text, Sampling(), tokens, sample_generator(0, number))): [] for number, text in enumerate(texts)
    }
    while engine.busy:
        for event in engine.step():
            assert event.token is not None, event.message
            answers[event.request].append(event.token)
    return list(answers.values())


def is_a_tie(model: Any, text: Sequence[int], first: int, second: int) -> bool:
    """Whether the model finds both tokens equally likely after the text."""
    with torch.no_grad():
        logits_V = model(torch.tensor([text])).logits[0, -1]
    return bool((logits_V[first] - logits_V[second]).abs() < TIE)


@pytest.mark.parametrize("name", USUAL)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path, tokenizer_file: Path, export: Callable[..., Exported]) -> None:
    compare(name, tmp_path, tokenizer_file, export, of_a_length=1, tokens=24)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_64_tokens_after_20_prompts(name: str, tmp_path: Path, tokenizer_file: Path, export: Callable[..., Exported]) -> None:
    compare(name, tmp_path, tokenizer_file, export, of_a_length=5, tokens=64)


def compare(name: str, folder: Path, tokenizer_file: Path, export: Callable[..., Exported], *, of_a_length: int, tokens: int) -> None:
    config = config_of({**MODELS[name], "tokenizer_type": "HFTokenizer", "vocab_file": str(tokenizer_file), "load": str(folder / "run")})
    gpt = lively_model(config)
    if name.startswith(("qwen2-moe", "glm4-moe")):  # these have no bias there
        for key, tensor in gpt.state_dict().items():
            if key.endswith("attention.dense.bias"):
                tensor.zero_()
    save_model(folder / "run", config, gpt)
    export(folder / "run", folder / "hf")
    ready = load_ready_model(config)
    ready = replace(ready, tokenizer=Endless(ready.tokenizer), ends=())
    batches = prompts(ready.tokenizer.vocab_size, of_a_length)
    texts = [text for batch in batches for text in batch.tolist()]
    model, expected = theirs(folder / "hf", batches, ready.tokenizer.vocab_size, tokens)
    found = ours(ready, texts, tokens, at_once=8)

    assert [len(answer) for answer in found] == [tokens] * len(texts)
    assert len({tuple(answer) for answer in found}) > len(texts) / 2, "the answers depend on their prompts"
    differing = [(text, answer, other) for text, answer, other in zip(texts, found, expected, strict=True) if answer != other]
    for text, answer, other in differing:
        place = next(place for place in range(tokens) if answer[place] != other[place])
        assert is_a_tie(model, [*text, *answer[:place]], answer[place], other[place]), (place, answer, other)
    assert len(differing) <= 1
    some = slice(None, None, max(1, len(texts) // 4))
    assert ours(ready, texts[some], tokens, at_once=1) == found[some], "in a batch as alone"
