"""Loss and bits per byte against a loop that predicts one token at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from megatron.data.tokenizer.huggingface import HFTokenizer
from megatron.inference import score
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.score import TextScore, Window, plan_windows, score_text, score_tokens
from tests.inference.conftest import NoEndTokenizer, build_ready, lively_config

TEXT = "My fellow citizens, the state of the Union — as ever — is strong, and so on and so forth until the very last byte."


def naive_losses(ready: ReadyModel, tokens: list[int], stride: int) -> list[float]:
    """-log p of each token by itself: everything before it that its window holds goes through the model, alone, for that one prediction."""
    text = [ready.tokenizer.eod, *tokens]
    length, losses = ready.context_length, []
    end, begin = min(length, len(tokens)), 0
    for i in range(len(tokens)):
        if i >= end:
            end = min(end + stride, len(tokens))
            begin = end - length
        with torch.no_grad():
            logits_V = ready.gpt(torch.tensor([text[begin : i + 1]])).logits_BSV[0, -1]
        losses.append(-logits_V.double().log_softmax(0)[text[i + 1]].item())
    return losses


@pytest.mark.parametrize(
    ("length", "stride"), [(1, 16), (20, 16), (31, 16), (32, 16), (33, 16), (48, 16), (49, 16), (90, 16), (70, 5), (70, 32), (40, 1)]
)
def test_every_token_as_in_a_naive_loop(ready: ReadyModel, length: int, stride: int) -> None:
    tokens = list(TEXT.encode())[:length]
    expected = torch.tensor(naive_losses(ready, tokens, stride))
    torch.testing.assert_close(score_tokens(ready, tokens, stride=stride), expected, atol=2e-5, rtol=2e-5)


def test_bits_per_byte_is_the_sum_over_all_bytes(any_ready: ReadyModel) -> None:
    result = score_text(any_ready, TEXT, stride=16)
    nats = sum(naive_losses(any_ready, list(TEXT.encode()), 16))
    assert result.tokens == result.bytes == len(TEXT.encode()) > len(TEXT)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-5)
    assert result.loss == pytest.approx(nats / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / result.tokens), rel=1e-5)
    assert result.exact


def byte_pair_tokenizer(path: Path) -> HFTokenizer:
    """A tokenizer whose tokens are longer than a byte, and whose end of a document is not id 0."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=290, special_tokens=["<unused>", "<|endoftext|>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))
    return HFTokenizer(path)


def test_bits_are_per_byte_not_per_token(tmp_path: Path) -> None:
    tokenizer = byte_pair_tokenizer(tmp_path / "tokenizer.json")
    ready = build_ready(lively_config(), tokenizer)
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.eod == 1
    assert len(tokens) < len(TEXT.encode())
    nats = sum(naive_losses(ready, tokens, 16))
    result = score_text(ready, TEXT, stride=16)
    assert (result.tokens, result.bytes, result.exact) == (len(tokens), len(TEXT.encode()), True)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert result.loss == pytest.approx(nats / len(tokens), rel=1e-5)


def test_the_size_of_a_batch_changes_nothing(ready: ReadyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(TEXT.encode())
    together = score_tokens(ready, tokens, stride=3)
    monkeypatch.setattr(score, "BATCH_TOKENS", {"cpu": 1})
    torch.testing.assert_close(score_tokens(ready, tokens, stride=3), together, atol=1e-5, rtol=1e-5)


def test_a_uniform_model_pays_the_logarithm_of_its_vocabulary() -> None:
    ready = build_ready(lively_config())
    ready.gpt.sequential["6"].final_linear.weight.zero_()
    assert score_text(ready, TEXT, stride=16).bits_per_byte == pytest.approx(9.0)  # 512 ids, one a byte


def test_without_an_end_of_document_token_the_first_is_a_uniform_guess(ready: ReadyModel) -> None:
    tokens = list(TEXT.encode())[:20]
    loss_N = score_tokens(replace(ready, tokenizer=NoEndTokenizer()), tokens, stride=16)
    with torch.no_grad():
        log_p_NV = ready.gpt(torch.tensor([tokens[:-1]])).logits_BSV[0].log_softmax(-1)
    rest = -log_p_NV.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(loss_N, torch.cat([torch.tensor([math.log(512)]), rest]), atol=2e-5, rtol=2e-5)
    assert score_tokens(replace(ready, tokenizer=NoEndTokenizer()), [7], stride=16).tolist() == pytest.approx([math.log(512)])


@pytest.mark.parametrize("total", range(1, 40))
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_count_each_prediction_once_with_enough_before_it(total: int, stride: int) -> None:
    windows = plan_windows(total, 8, stride)
    assert [i for window in windows for i in range(window.first, window.end)] == list(range(total))
    assert all(window.end - window.begin == min(8, total) for window in windows)
    assert all(window.first - window.begin >= 8 - stride for window in windows[1:])


def test_no_predictions_no_windows() -> None:
    assert plan_windows(0, 8, 4) == []
    assert plan_windows(3, 8, 4) == [Window(0, 0, 3)]


def test_progress_adds_up(ready: ReadyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "BATCH_TOKENS", {"cpu": 64})
    told: list[tuple[int, int]] = []
    score_text(ready, TEXT, stride=4, progress=lambda tokens, total: told.append((tokens, total)))
    length = len(TEXT.encode())
    assert len(told) > 3
    assert sum(tokens for tokens, _ in told) == length
    assert {total for _, total in told} == {length}


def test_a_tokenizer_that_loses_text_is_noticed(ready: ReadyModel) -> None:
    assert not score_text(ready, "a\0b", stride=16).exact  # byte 0 is the end of a document and decodes to nothing


def test_a_text_without_tokens_is_refused(ready: ReadyModel) -> None:
    with pytest.raises(InferenceError, match="The text holds no tokens"):
        score_text(ready, "", stride=16)


def test_a_model_that_diverged_is_named() -> None:
    broken = build_ready(lively_config())
    next(broken.gpt.parameters()).fill_(float("nan"))
    with pytest.raises(InferenceError, match="gives a loss that is NaN or infinite"):
        score_text(broken, TEXT, stride=16)


def test_a_hopeless_model_has_infinite_perplexity_not_an_overflow() -> None:
    assert TextScore(tokens=1, bytes=1, nats=1e4, exact=True).perplexity == math.inf
