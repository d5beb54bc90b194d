"""Text in, text out: what a sample says, and that each depends on its prompt and number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.inference.continuation import Continuation, Manner, Prompt, complete, encode_prompt, sample_generator
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.sampling import Sampling
from tests.inference.conftest import GREEDY, NoEndTokenizer, answers, asked, build_ready, engine_of, lively_config


def samples(ready: ReadyModel, prompts: Sequence[str], count: int, sampling: Sampling = GREEDY, *, at_once: int = 1) -> list[Continuation]:
    numbered = [Prompt(prompt, encode_prompt(ready, prompt), index) for index, prompt in enumerate(prompts)]
    return list(complete(engine_of(ready, at_once), numbered, Manner(sampling, count, seed=0)))


def sample(ready: ReadyModel, prompt: str, count: int, sampling: Sampling = GREEDY, on_text: Callable[[str], None] | None = None) -> Continuation:
    numbered = [Prompt(prompt, encode_prompt(ready, prompt), 0)]
    (found,) = complete(engine_of(ready), numbered, Manner(sampling, count, seed=0), on_text=on_text)
    return found


def contents(found: Sequence[Continuation]) -> list[Continuation]:
    return [replace(one, duration_seconds=0) for one in found]


def ending(ready: ReadyModel, token: int) -> ReadyModel:
    """The same model with a tokenizer whose texts end at `token`."""
    tokenizer = CharLevelTokenizer()
    tokenizer.eod = token
    return replace(ready, tokenizer=tokenizer)


@pytest.mark.parametrize("at_once", [2, 3, 10])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8)])
def test_several_at_once_give_in_order_what_each_gives_alone(ready: ReadyModel, at_once: int, sampling: Sampling) -> None:
    """Prompts of different lengths, one of them without room for an answer, whose answers end at different times."""
    prompts = ["Hello", "a" * 20, "x" * 40, "b", "", "Hello", "The Union"]
    tokens = answers(engine_of(ready), [asked([*b"Hello"], 12)])[0]
    some_end = ending(ready, tokens[7])
    alone = contents(samples(some_end, prompts, 14, sampling))
    assert [one.context for one in alone] == prompts
    assert len({one.length for one in alone}) > 2
    assert contents(samples(some_end, prompts, 14, sampling, at_once=at_once)) == alone


def test_each_sample_has_random_numbers_of_its_own(ready: ReadyModel) -> None:
    drawn = {(seed, index): torch.rand(1, generator=sample_generator(seed, index)).item() for seed in range(3) for index in range(3)}
    assert len(set(drawn.values())) == 9
    first, second = samples(ready, ["Hello", "Hello"], 12, Sampling(1.0))
    assert first.text != second.text


def test_the_end_of_document_token_ends_the_text(ready: ReadyModel) -> None:
    (free,) = answers(engine_of(replace(ready, tokenizer=NoEndTokenizer())), [asked([*b"Hello"], 10)])
    stop = free[4]
    model = ending(ready, stop)
    found = sample(model, "Hello", 10)
    assert (found.finished, found.length, found.message, found.finish_reason) == (True, free.index(stop), None, "stop")
    assert found.text == model.tokenizer.decode(free[: free.index(stop)])


def test_a_stop_string_ends_the_text(ready: ReadyModel) -> None:
    whole = sample(ready, "Hello", 20)
    assert not whole.finished
    stop = whole.text[4:7]
    numbered = [Prompt("Hello", [*b"Hello"], 0)]
    (found,) = complete(engine_of(ready), numbered, Manner(GREEDY, 20, 0, stop=("never there", stop)))
    assert (found.text, found.finished, found.finish_reason) == (whole.text[: whole.text.index(stop)], True, "stop")


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
    found = sample(replace(ready, tokenizer=NoEndTokenizer()), "Hello", 3)
    assert (found.context, found.length, found.finished, found.message, found.finish_reason) == ("Hello", 3, False, None, "length")
    assert found.duration_seconds > 0


def test_prompt_and_answer_never_exceed_the_context(ready: ReadyModel) -> None:
    found = sample(replace(ready, tokenizer=NoEndTokenizer()), "x" * 30, 10)
    assert (found.length, found.finish_reason) == (2, "context")
    assert found.message == "prompt (30 tokens) and answer (2) fill the model's context of 32 tokens (seq_length)"


@pytest.mark.parametrize("length", [32, 33, 500])
def test_a_prompt_without_room_for_an_answer_says_so(ready: ReadyModel, length: int) -> None:
    found = sample(ready, "x" * length, 10)
    assert (found.text, found.length, found.finished, found.finish_reason) == ("", 0, False, "context")
    assert found.message == f"the prompt has {length} tokens and the model's context 32 (seq_length): there is no room for an answer"


def test_an_empty_prompt_starts_at_the_end_of_a_document(ready: ReadyModel) -> None:
    assert encode_prompt(ready, "") == [0]


def test_without_such_a_token_there_is_nothing_to_start_from(ready: ReadyModel) -> None:
    with pytest.raises(InferenceError, match=r"cannot start without a prompt\. Give a prompt \(sample_input_file\)"):
        encode_prompt(replace(ready, tokenizer=NoEndTokenizer()), "")


def test_a_model_that_puts_out_nan_is_named() -> None:
    broken = build_ready(lively_config())
    next(broken.gpt.parameters()).fill_(float("nan"))
    with pytest.raises(InferenceError, match=r"The model in global_step2 gives NaN or infinite numbers"):
        sample(broken, "Hello", 1)


def test_streamed_pieces_make_the_text(ready: ReadyModel) -> None:
    pieces: list[str] = []
    found = sample(ready, "Hello", 25, Sampling(1.5), pieces.append)
    assert "".join(pieces) == found.text
    assert len(pieces) > 1
