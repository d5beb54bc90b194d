"""/v1/completions through the real `openai` client, against the engine alone."""

from __future__ import annotations

from collections.abc import Sequence

import openai
import pytest

from megatron.inference.continuation import sample_generator
from megatron.inference.engine import Request
from megatron.inference.routing_trace import RoutingTrace
from megatron.inference.runner import ModuleRunner
from megatron.inference.sampling import Sampling
from tests.inference.conftest import GREEDY, answers, argmax_without_cache, engine_of
from tests.inference.serve.conftest import Served

PROMPTS = ["Hello", "The state of the Union", "x", "1790"]


def expected_text(here: Served, prompt: str, count: int) -> str:
    """Greedy, by its definition: without engine, cache and server."""
    return here.ready.tokenizer.decode(argmax_without_cache(here.ready, here.ready.tokenizer.encode(prompt), count))


def test_a_prompt_is_continued_as_by_definition(here: Served, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.text == expected_text(here, "Hello", 12)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 12, 17)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.id.startswith("cmpl-")


def test_a_stream_joins_to_the_same_text(here: Served, client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    parts = list(client.completions.create(model="tiny", prompt="Hello", max_tokens=12, temperature=0, stream=True, stream_options=options))
    *pieces, last = parts
    assert "".join(part.choices[0].text for part in pieces) == expected_text(here, "Hello", 12)
    assert len(pieces) > 5
    assert [part.choices[0].finish_reason for part in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12


def test_prompts_in_all_forms(here: Served, client: openai.OpenAI) -> None:
    tokens = [here.ready.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = [expected_text(here, prompt, 6) for prompt in PROMPTS]
    for given in (PROMPTS, tokens):
        found = client.completions.create(model="tiny", prompt=given, max_tokens=6, temperature=0).choices
        assert [choice.text for choice in found] == expected
        assert [choice.index for choice in found] == [0, 1, 2, 3]
    assert client.completions.create(model="tiny", prompt=tokens[0], max_tokens=6, temperature=0).choices[0].text == expected[0]


def test_sampling_follows_the_seed_and_the_settings(here: Served, client: openai.OpenAI) -> None:
    def texts(seed: int | None, n: int = 3, **options: float) -> list[str]:
        found = client.completions.create(model="tiny", prompt="Hello", max_tokens=10, n=n, seed=seed, **options)  # type: ignore[call-overload]
        return [choice.text for choice in found.choices]

    def by_engine(sampling: Sampling) -> list[str]:
        tokens = here.ready.tokenizer.encode("Hello")
        requests = [Request(tokens, sampling, 10, sample_generator(5, number)) for number in range(3)]
        return [here.ready.tokenizer.decode(found) for found in answers(engine_of(here.ready), requests)]

    assert texts(5) == by_engine(Sampling(1.0))
    assert texts(5, temperature=0.7, top_p=0.8) == by_engine(Sampling(0.7, top_p=0.8))
    assert texts(5, extra_body={"top_k": 3}) == by_engine(Sampling(1.0, top_k=3))  # type: ignore[arg-type]
    own = {"min_p": 0.5, "repetition_penalty": 1.5}
    assert texts(5, extra_body=own) == by_engine(Sampling(1.0, min_p=0.5, repetition_penalty=1.5))  # type: ignore[arg-type]
    repeating = texts(5, presence_penalty=-2, frequency_penalty=-2)
    assert repeating == by_engine(Sampling(1.0, presence_penalty=-2, frequency_penalty=-2))
    assert repeating != texts(5)
    assert len(set(texts(5))) == 3
    assert texts(6) != texts(5)
    assert texts(None) != texts(None)
    assert texts(-1) == texts(-1)


def test_echo_puts_the_prompt_first(here: Served, client: openai.OpenAI) -> None:
    expected = "Hello" + expected_text(here, "Hello", 4)
    assert client.completions.create(model="tiny", prompt="Hello", max_tokens=4, temperature=0, echo=True).choices[0].text == expected
    parts = client.completions.create(model="tiny", prompt="Hello", max_tokens=4, temperature=0, echo=True, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(here: Served, client: openai.OpenAI, stream: bool) -> None:
    whole = expected_text(here, "Hello", 20)
    stop = whole[7:9]
    found = client.completions.create(model="tiny", prompt="Hello", max_tokens=20, temperature=0, stop=["never", stop], stream=stream)
    parts = list(found) if stream else [found]
    assert "".join(part.choices[0].text for part in parts) == whole[: whole.index(stop)]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model(here: Served, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=5, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    runner = ModuleRunner(here.ready)
    state = runner.open(20)
    tokens = here.ready.tokenizer.encode("Hello")
    for text, value, best in zip(logprobs.tokens or [], logprobs.token_logprobs or [], logprobs.top_logprobs or [], strict=True):
        logprob_V = runner.prefill(state, tokens).log_softmax(0)
        tokens = here.ready.tokenizer.encode(text)
        assert value == pytest.approx(float(logprob_V[tokens[0]]), abs=1e-4)
        assert list(best.values()) == pytest.approx(logprob_V.topk(3).values.tolist(), abs=1e-4)


def test_the_context_ends_a_text_that_may_use_all_of_it(client: openai.OpenAI, here: Served) -> None:
    prompt = "a" * 250
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
    assert answer.usage is not None
    assert answer.usage.total_tokens == here.ready.context_length
    assert client.completions.create(model="tiny", prompt=prompt).choices[0].finish_reason == "length"  # the default of 16 has no room


def test_routing_is_that_of_the_tokens_that_the_model_read(here: Served) -> None:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 6, "temperature": 0, "return_routing": True}
    (choice,) = here.post("/v1/completions", body).json()["choices"]
    streamed = [record for part in _events(here, body) for choice in part["choices"] for record in choice.get("routing", [])]
    assert choice["routing"] == streamed
    assert [record["position"] for record in streamed] == list(range(10))  # the last token is not read any more
    assert "".join(record["text"] for record in streamed) == "Hello" + choice["text"][:-1]
    runner, trace = ModuleRunner(here.ready), RoutingTrace()
    runner.prefill(runner.open(20), here.ready.tokenizer.encode("Hello" + choice["text"][:-1]), trace)
    assert [record["experts"] for record in streamed] == [record.experts for record in trace.tokens()]
    assert [record["lores"] for record in streamed] == [record.lores for record in trace.tokens()]


def _events(here: Served, body: dict[str, object]) -> Sequence[dict[str, list[dict[str, list[dict[str, object]]]]]]:
    import json

    lines = here.post("/v1/completions", {**body, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_models_are_listed(client: openai.OpenAI, here: Served) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    description = model.model_dump()
    assert description["context_length"] == 256
    assert description["moe_layers"] == [{"layer": 0, "experts": 4, "lores": 4}, {"layer": 1, "experts": 4, "lores": 4}]


def test_greedy_is_the_engine_s_greedy(here: Served, client: openai.OpenAI) -> None:
    requests = [Request(here.ready.tokenizer.encode(prompt), GREEDY, 8, sample_generator(0, 0)) for prompt in PROMPTS]
    expected = [here.ready.tokenizer.decode(tokens) for tokens in answers(engine_of(here.ready, 4), requests)]
    found = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=8, temperature=0).choices
    assert [choice.text for choice in found] == expected
