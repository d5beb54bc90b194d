"""What every runner must do, measured against the model's own logits for the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.inference import runner as module
from megatron.inference.model import ReadyModel
from megatron.inference.runner import ModuleRunner
from megatron.model.attention import CacheError
from tests.inference.conftest import build_ready, lively_config

TEXTS = [[72, 101, 108, 108, 111], [90], list(range(60, 72))]


def whole_text_logits(ready: ReadyModel, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits_BSV = ready.gpt(torch.tensor([tokens])).logits_BSV
    assert logits_BSV is not None
    return logits_BSV[0, -1, : ready.tokenizer.vocab_size]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_prefill_gives_the_logits_of_the_last_position(any_ready: ReadyModel) -> None:
    runner = ModuleRunner(any_ready)
    for tokens in TEXTS:
        state = runner.open(20)
        assert_close(runner.prefill(state, tokens), whole_text_logits(any_ready, tokens))
        assert (state.length, state.capacity) == (len(tokens), 20)


def test_a_long_prompt_goes_through_the_model_in_chunks(any_ready: ReadyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFILL_CHUNK", 5)
    lengths: list[int] = []
    hook = any_ready.gpt.sequential["0"].register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    runner, tokens = ModuleRunner(any_ready), TEXTS[2]
    try:
        found = runner.prefill(runner.open(20), tokens)
    finally:
        hook.remove()
    assert lengths == [5, 5, 2]
    assert_close(found, whole_text_logits(any_ready, tokens))


def test_a_window_is_honoured_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFILL_CHUNK", 3)
    ready = build_ready(lively_config(sliding_window_width=4))
    runner, state = ModuleRunner(ready), ModuleRunner(ready).open(20)
    assert_close(runner.prefill(state, TEXTS[2]), whole_text_logits(ready, TEXTS[2]))
    assert_close(runner.decode([state], [5])[0], whole_text_logits(ready, [*TEXTS[2], 5]))
    endless = ModuleRunner(build_ready(lively_config()))
    assert not torch.allclose(endless.prefill(endless.open(20), TEXTS[2]), whole_text_logits(ready, TEXTS[2]), atol=1e-2)


def test_decode_adds_one_token_to_texts_of_different_lengths(any_ready: ReadyModel) -> None:
    runner = ModuleRunner(any_ready)
    states, texts = [runner.open(20) for _ in TEXTS], [list(text) for text in TEXTS]
    for state, text in zip(states, texts, strict=True):
        runner.prefill(state, text)
    for tokens in ([7, 8, 9], [70, 80, 90]):
        logits_NV = runner.decode(states, tokens)
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        assert_close(logits_NV, torch.stack([whole_text_logits(any_ready, text) for text in texts]))
    assert [state.length for state in states] == [len(text) for text in texts]


def test_logits_are_float32_and_of_the_tokenizers_vocabulary(ready: ReadyModel) -> None:
    class Small(CharLevelTokenizer):
        vocab_size = 7

    runner = ModuleRunner(replace(build_ready(lively_config(), dtype=torch.bfloat16), tokenizer=Small()))
    state = runner.open(4)
    for logits in (runner.prefill(state, [1, 2]), runner.decode([state], [3])[0]):
        assert (logits.shape, logits.dtype) == ((7,), torch.float32)


def test_a_full_text_takes_no_more(ready: ReadyModel) -> None:
    runner = ModuleRunner(ready)
    state = runner.open(2)
    runner.prefill(state, [1, 2])
    with pytest.raises(CacheError, match=r"2 \+ 1 tokens do not fit into a cache of 2 positions"):
        runner.decode([state], [3])
    with pytest.raises(CacheError, match="a cache of 49 positions: the model has at most 48"):
        runner.open(49)
