"""Generation with a cache against its definition, and that no request sees another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.inference.continuation import TextStream, complete, encode_prompt, generate_tokens, next_logits, sample_generator
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.sampling import Sampling
from megatron.model.attention import build_cache
from tests.inference.conftest import NoEndTokenizer, argmax_without_cache, build_ready, lively_config

PROMPT = [72, 101, 108, 108, 111]
GREEDY = Sampling()


def generate(ready: ReadyModel, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY, seed: int = 0) -> list[int]:
    return list(generate_tokens(ready, prompt, sampling=sampling, maximum_tokens=count, generator=sample_generator(seed, 0)))


def test_with_a_cache_as_without(any_ready: ReadyModel) -> None:
    endless = replace(any_ready, tokenizer=NoEndTokenizer())
    assert generate(endless, PROMPT, 20) == argmax_without_cache(endless, PROMPT, 20)


def test_logits_with_a_cache_as_without(any_ready: ReadyModel) -> None:
    cache = build_cache(any_ready.sizes, 1, 8)
    for begin, end in [(0, 3), (3, 4), (4, 8)]:  # a prompt, one token, several at once
        tokens = list(range(60, 60 + end))
        torch.testing.assert_close(next_logits(any_ready, tokens[begin:], cache), next_logits(any_ready, tokens, None), atol=1e-4, rtol=1e-4)


def test_each_new_token_is_one_position_of_work(ready: ReadyModel) -> None:
    lengths: list[int] = []
    hook = ready.gpt.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    try:
        generate(replace(ready, tokenizer=NoEndTokenizer()), PROMPT, 6)
    finally:
        hook.remove()
    assert lengths == [5, 1, 1, 1, 1, 1]


def test_prompts_in_a_row_do_not_influence_each_other(ready: ReadyModel) -> None:
    """Upstream kept its cache on the layers and continued the first prompt's text in the second."""
    others = [[0], PROMPT, [90] * 20]
    alone = [generate(build_ready(lively_config()), prompt, 8) for prompt in others]
    assert [generate(ready, prompt, 8) for prompt in others] == alone
    assert [generate(ready, prompt, 8) for prompt in reversed(others)] == alone[::-1]


def test_two_requests_at_once_do_not_influence_each_other(ready: ReadyModel) -> None:
    ready = replace(ready, tokenizer=NoEndTokenizer())
    prompts = [PROMPT, [90, 91]]
    streams = [generate_tokens(ready, prompt, sampling=GREEDY, maximum_tokens=6, generator=sample_generator(0, 0)) for prompt in prompts]
    alternating = list(zip(*streams, strict=True))
    assert [list(tokens) for tokens in zip(*alternating, strict=True)] == [generate(ready, prompt, 6) for prompt in prompts]


def test_an_abandoned_request_leaves_nothing(ready: ReadyModel) -> None:
    expected = generate(ready, PROMPT, 8)
    stream = generate_tokens(ready, [90] * 10, sampling=GREEDY, maximum_tokens=8, generator=sample_generator(0, 0))
    next(stream)
    del stream
    assert generate(ready, PROMPT, 8) == expected


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, top_k=20), Sampling(1.0, top_p=0.9)])
def test_a_seed_reproduces(ready: ReadyModel, sampling: Sampling) -> None:
    assert generate(ready, PROMPT, 12, sampling, seed=5) == generate(ready, PROMPT, 12, sampling, seed=5)
    assert generate(ready, PROMPT, 12, sampling, seed=5) != generate(ready, PROMPT, 12, sampling, seed=6)


def test_each_sample_has_random_numbers_of_its_own() -> None:
    drawn = {(seed, index): torch.rand(1, generator=sample_generator(seed, index)).item() for seed in range(3) for index in range(3)}
    assert len(set(drawn.values())) == 9


def test_only_ids_that_the_tokenizer_has_are_generated(ready: ReadyModel) -> None:
    class Small(CharLevelTokenizer):
        vocab_size = 7

    small = replace(ready, tokenizer=Small())
    assert next_logits(small, [1], None).shape == (7,)
    assert max(generate(small, [1], 20, Sampling(100.0))) < 7


def ending(ready: ReadyModel, token: int) -> ReadyModel:
    """The same model with a tokenizer whose texts end at `token`."""
    tokenizer: Any = CharLevelTokenizer()
    tokenizer.eod = token
    return replace(ready, tokenizer=tokenizer)


def test_the_end_of_document_token_ends_the_text(ready: ReadyModel) -> None:
    free = generate(replace(ready, tokenizer=NoEndTokenizer()), PROMPT, 10)
    stop = free[4]
    model = ending(ready, stop)
    assert generate(model, PROMPT, 10) == free[: free.index(stop) + 1]
    sample = complete(model, "Hello", sampling=GREEDY, maximum_tokens=10, generator=sample_generator(0, 0))
    assert (sample.finished, sample.length, sample.message) == (True, free.index(stop), None)
    assert sample.text == model.tokenizer.decode(free[: free.index(stop)])


def test_every_end_of_the_model_ends_the_text(ready: ReadyModel) -> None:
    """As generation_config.json names them: the end of a turn beside the end of a document."""
    endless = replace(ready, tokenizer=NoEndTokenizer())
    free = generate(endless, PROMPT, 20)
    other, last = free[3], free[9]
    stops = replace(ready, ends=(last, other))
    first = min(free.index(other), free.index(last))
    assert generate(stops, PROMPT, 20) == free[: first + 1]
    sample = complete(stops, "Hello", sampling=GREEDY, maximum_tokens=20, generator=sample_generator(0, 0))
    assert (sample.finished, sample.length, sample.message) == (True, first, None)


class NoZTokenizer(CharLevelTokenizer):
    """Drops every z."""

    def loses(self, character: str) -> bool:
        return character == "z"

    def encode(self, text: str) -> list[int]:
        return super().encode(text.replace("z", ""))


def test_what_a_prompt_loses_is_said(ready: ReadyModel, caplog: pytest.LogCaptureFixture) -> None:
    lossy = replace(ready, tokenizer=NoZTokenizer())
    assert encode_prompt(lossy, "lazy") == [*b"lay"]
    assert "The tokenizer has no tokens for 1 character ('z' 1 time) of the prompt, so the model does not see them." in caplog.text
    with pytest.raises(InferenceError, match="The tokenizer has no tokens for the prompt 'zz': write it with characters that the tokenizer has"):
        encode_prompt(lossy, "zz")


def test_a_text_cut_off_at_maximum_tokens_is_not_finished(ready: ReadyModel) -> None:
    sample = complete(replace(ready, tokenizer=NoEndTokenizer()), "Hello", sampling=GREEDY, maximum_tokens=3, generator=sample_generator(0, 0))
    assert (sample.context, sample.length, sample.finished, sample.message) == ("Hello", 3, False, None)
    assert sample.duration_seconds > 0


def test_prompt_and_answer_never_exceed_the_context(ready: ReadyModel) -> None:
    endless = replace(ready, tokenizer=NoEndTokenizer())
    assert len(generate(endless, PROMPT, 1000)) == 32 - 5
    sample = complete(endless, "x" * 30, sampling=GREEDY, maximum_tokens=10, generator=sample_generator(0, 0))
    assert sample.length == 2
    assert sample.message == "prompt (30 tokens) and answer (2) fill the model's context of 32 tokens (seq_length)"


@pytest.mark.parametrize("length", [32, 33, 500])
def test_a_prompt_without_room_for_an_answer_says_so(ready: ReadyModel, length: int) -> None:
    sample = complete(ready, "x" * length, sampling=GREEDY, maximum_tokens=10, generator=sample_generator(0, 0))
    assert (sample.text, sample.length, sample.finished) == ("", 0, False)
    assert sample.message == f"the prompt has {length} tokens and the model's context 32 (seq_length): there is no room for an answer"


def test_an_empty_prompt_starts_at_the_end_of_a_document(ready: ReadyModel) -> None:
    assert encode_prompt(ready, "") == [0]


def test_without_such_a_token_there_is_nothing_to_start_from(ready: ReadyModel) -> None:
    with pytest.raises(InferenceError, match=r"cannot start without a prompt\. Give a prompt \(sample_input_file\)"):
        encode_prompt(replace(ready, tokenizer=NoEndTokenizer()), "")


def test_a_model_that_puts_out_nan_is_named() -> None:
    broken = build_ready(lively_config())
    next(broken.gpt.parameters()).fill_(float("nan"))
    with pytest.raises(InferenceError, match=r"The model in global_step2 gives NaN or infinite numbers"):
        generate(broken, PROMPT, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(dtype: torch.dtype) -> None:
    ready = build_ready(lively_config(), dtype=dtype)
    assert len(generate(replace(ready, tokenizer=NoEndTokenizer()), PROMPT, 4)) == 4


def test_pieces_of_text_end_where_characters_do(ready: ReadyModel) -> None:
    stream = TextStream(ready)
    pieces = [stream.push(byte) for byte in "aé€".encode()]
    assert pieces == ["a", "", "é", "", "", "€"]
    assert (stream.finish(), stream.shown) == ("", "aé€")


def test_the_start_of_a_character_at_the_very_end_is_shown_as_such(ready: ReadyModel) -> None:
    stream = TextStream(ready)
    assert [stream.push(byte) for byte in "aé".encode()[:2]] == ["a", ""]
    assert stream.finish() == "\ufffd"


def test_streamed_pieces_make_the_text(ready: ReadyModel) -> None:
    pieces: list[str] = []
    sample = complete(ready, "Hello", sampling=Sampling(1.5), maximum_tokens=25, generator=sample_generator(1, 0), on_text=pieces.append)
    assert "".join(pieces) == sample.text
    assert len(pieces) > 1
