"""Continuous batching: tokens against generation by its definition, and that no request sees another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.inference import engine as module
from megatron.inference import runner as runner_module
from megatron.inference.engine import Engine, Request
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.routing_trace import RoutingTrace, TokenRouting
from megatron.inference.runner import ModuleRunner, TextState
from megatron.inference.sampling import Sampling
from tests.inference.conftest import GREEDY, NoEndTokenizer, answers, argmax_without_cache, asked, build_ready, engine_of, lively_config, run

PROMPT = [72, 101, 108, 108, 111]
PROMPTS = [PROMPT, [90], [*range(60, 80)], [90, 91]]


@pytest.fixture
def endless(ready: ReadyModel) -> ReadyModel:
    """Its texts have no end."""
    return replace(ready, tokenizer=NoEndTokenizer())


def alone(ready: ReadyModel, requests: Sequence[Request]) -> list[list[int]]:
    return [answers(engine_of(ready), [request])[0] for request in requests]


class CountingRunner(ModuleRunner):
    """Notes what it is asked for: ("prefill", tokens of the part) and ("decode", texts)."""

    def __init__(self, ready: ReadyModel) -> None:
        super().__init__(ready)
        self.calls: list[tuple[str, int]] = []
        self.capacities: list[int] = []

    def open(self, capacity: int) -> TextState:
        self.capacities.append(capacity)
        return super().open(capacity)

    def prefill(self, state: TextState, tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        if len(tokens) != 1 or state.length == 0:
            self.calls.append(("prefill", len(tokens)))
        return super().prefill(state, tokens, trace)

    def decode(self, states: Sequence[TextState], tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        self.calls.append(("decode", len(states)))
        return super().decode(states, tokens, trace)


def test_greedy_tokens_are_those_of_the_definition(any_ready: ReadyModel) -> None:
    endless = replace(any_ready, tokenizer=NoEndTokenizer())
    found = answers(engine_of(endless, 3), [asked(prompt, 12) for prompt in PROMPTS])
    assert found == [argmax_without_cache(endless, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(0.8, top_k=20), Sampling(1.0, top_p=0.9)])
def test_a_request_gets_the_same_alone_and_beside_others(ready: ReadyModel, sampling: Sampling) -> None:
    def requests() -> list[Request]:
        return [asked(prompt, 10, sampling, seed=number) for number, prompt in enumerate(PROMPTS)]

    expected = alone(build_ready(lively_config()), requests())
    assert answers(engine_of(ready, 4), requests()) == expected
    assert answers(engine_of(ready, 2), requests()[::-1]) == expected[::-1]


def test_a_request_that_comes_later_is_read_between_the_tokens_of_others(endless: ReadyModel) -> None:
    runner = CountingRunner(endless)
    engine = Engine(endless, runner, maximum_requests=2)
    numbers = [engine.submit(asked(PROMPTS[0], 6))]
    early = [event for _ in range(3) for event in engine.step()]
    numbers.append(engine.submit(asked(PROMPTS[2], 3)))
    events = run(engine, numbers)
    assert runner.calls == [("prefill", 5), ("decode", 1), ("decode", 1), ("prefill", 20), ("decode", 2), ("decode", 2), ("decode", 1)]
    assert [event.token for event in [*early, *events[0]]] == argmax_without_cache(endless, PROMPTS[0], 6)
    assert [event.token for event in events[1]] == argmax_without_cache(endless, PROMPTS[2], 3)


def test_a_long_prompt_does_not_stop_the_texts_that_run(endless: ReadyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFILL_CHUNK", 4)
    monkeypatch.setattr(runner_module, "PREFILL_CHUNK", 4)
    runner = CountingRunner(endless)
    engine = Engine(endless, runner, maximum_requests=2)
    found = answers(engine, [asked([90], 6), asked([*range(60, 70)], 2)])
    assert runner.calls[:6] == [("prefill", 1), ("decode", 1), ("prefill", 4), ("decode", 1), ("prefill", 4), ("decode", 1)]
    assert found == [argmax_without_cache(endless, [90], 6), argmax_without_cache(endless, [*range(60, 70)], 2)]


def test_each_text_has_room_for_prompt_and_answer(endless: ReadyModel) -> None:
    runner = CountingRunner(endless)
    answers(Engine(endless, runner, maximum_requests=4), [asked(PROMPT, 6), asked(PROMPT, 1000)])
    assert runner.capacities == [11, 32]


def test_no_more_run_at_once_than_allowed(endless: ReadyModel) -> None:
    runner = CountingRunner(endless)
    answers(Engine(endless, runner, maximum_requests=2), [asked(prompt, 4) for prompt in PROMPTS])
    assert max(count for kind, count in runner.calls if kind == "decode") == 2


def test_each_new_token_is_one_position_of_work(endless: ReadyModel) -> None:
    lengths: list[int] = []
    hook = endless.gpt.sequential["0"].register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    try:
        answers(engine_of(endless), [asked(PROMPT, 6)])
    finally:
        hook.remove()
    assert lengths == [5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_cancelled_request_leaves_nothing(endless: ReadyModel, steps: int) -> None:
    """While it waits, after its prompt and between two tokens."""
    engine = engine_of(endless, 2)
    gone = engine.submit(asked([90] * 10, 8))
    for _ in range(steps):
        engine.step()
    kept = engine.submit(asked(PROMPT, 8))
    engine.cancel(gone)
    engine.cancel(gone)
    (events,) = run(engine, [kept])
    assert [event.token for event in events] == argmax_without_cache(endless, PROMPT, 8)
    assert not engine.busy
    assert engine.step() == []


def test_a_request_may_be_cancelled_while_its_prompt_is_read(endless: ReadyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFILL_CHUNK", 4)
    engine = engine_of(endless)
    number = engine.submit(asked([*range(60, 70)], 2))
    assert engine.step() == []
    engine.cancel(number)
    assert not engine.busy


def test_the_last_event_says_why(ready: ReadyModel) -> None:
    free = argmax_without_cache(ready, PROMPT, 20)
    stops = replace(ready, tokenizer=NoEndTokenizer(), ends=(free[9], free[3]))  # the end of a turn beside the end of a document
    first = min(free.index(free[9]), free.index(free[3]))
    (until_stop,), (until_length,) = (run(engine, [engine.submit(asked(PROMPT, 20))]) for engine in (engine_of(stops), engine_of(ready)))
    assert [event.token for event in until_stop] == free[: first + 1]
    assert [event.finish_reason for event in until_stop] == [None] * first + ["stop"]
    assert [event.finish_reason for event in until_length] == [None] * 19 + ["length"]
    assert "".join(event.text for event in until_length) == ready.tokenizer.decode(free)


def test_the_context_ends_a_text(endless: ReadyModel) -> None:
    engine = engine_of(endless)
    (events,) = run(engine, [engine.submit(asked(PROMPT, 1000))])
    assert len(events) == 32 - 5
    assert (events[-1].finish_reason, events[-2].finish_reason) == ("context", None)
    assert events[-1].message == "prompt (5 tokens) and answer (27) fill the model's context of 32 tokens (seq_length)"


def test_a_prompt_without_room_ends_at_once_and_the_others_go_on(endless: ReadyModel) -> None:
    engine = engine_of(endless, 2)
    full, other = run(engine, [engine.submit(asked([90] * 32, 4)), engine.submit(asked(PROMPT, 4))])
    assert [(event.token, event.finish_reason) for event in full] == [(None, "context")]
    assert full[0].message == "the prompt has 32 tokens and the model's context 32 (seq_length): there is no room for an answer"
    assert [event.token for event in other] == argmax_without_cache(endless, PROMPT, 4)


def test_a_stop_string_over_several_tokens_is_never_shown(endless: ReadyModel) -> None:
    engine = engine_of(endless)
    (free,) = run(engine, [engine.submit(asked(PROMPT, 20))])
    whole = "".join(event.text for event in free)
    stop = whole[5:9]
    (events,) = run(engine, [engine.submit(asked(PROMPT, 20, stop=(stop,)))])
    assert "".join(event.text for event in events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert len(events) < 20
    (almost,) = run(engine, [engine.submit(asked(PROMPT, 20, stop=(whole[-3:] + "more",)))])
    assert "".join(event.text for event in almost) == whole, "what only begins a stop string is shown at the end"


def test_log_probabilities_are_those_of_the_model(endless: ReadyModel) -> None:
    engine = engine_of(endless)
    (events,) = run(engine, [engine.submit(asked(PROMPT, 3, Sampling(5.0, top_k=50), logprobs=4))])
    text = [*PROMPT]
    for event in events:
        assert event.token is not None
        with torch.no_grad():
            logits_BSV = endless.gpt(torch.tensor([text])).logits_BSV
        assert logits_BSV is not None
        expected = logits_BSV[0, -1, : endless.tokenizer.vocab_size].log_softmax(0)
        assert event.logprob == pytest.approx(float(expected[event.token]), abs=1e-4)
        assert [token for token, _ in event.alternatives] == expected.topk(4).indices.tolist()
        assert [value for _, value in event.alternatives] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)
        text.append(event.token)
    (plain,) = run(engine, [engine.submit(asked(PROMPT, 1))])
    assert (plain[0].logprob, plain[0].alternatives) == (None, ())


class BreakingRunner(ModuleRunner):
    """Reads no prompt of `bad` tokens, and gives NaN for texts of more than `longest` tokens."""

    bad, longest = 3, 8

    def prefill(self, state: TextState, tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        if len(tokens) == self.bad:
            raise InferenceError("The expert file ends early.")
        logits_V = super().prefill(state, tokens, trace)
        return logits_V * float("nan") if state.length > self.longest else logits_V


def test_a_request_that_fails_ends_alone(endless: ReadyModel) -> None:
    engine = Engine(endless, BreakingRunner(endless), maximum_requests=3)
    numbers = [engine.submit(asked(prompt, 4)) for prompt in ([1, 2, 3], [1] * 6, [90])]
    unreadable, broken, good = run(engine, numbers)
    assert [(event.token, event.finish_reason, event.message) for event in unreadable] == [(None, "error", "The expert file ends early.")]
    assert [event.finish_reason for event in broken] == [None, None, None, "error"]
    assert broken[-1].message.startswith("The model in global_step2 gives NaN or infinite numbers: its training diverged")
    assert [event.token for event in good] == argmax_without_cache(endless, [90], 4)


class NarrowRunner(ModuleRunner):
    """Has no room for the experts of several texts, which it notices in the middle of its work. `gone`: a token that cannot be read any more."""

    gone = -1

    def decode(self, states: Sequence[TextState], tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        logits_NV = super().decode(states, tokens, trace)
        if len(states) > 1 or tokens[0] == self.gone:
            raise InferenceError("The experts do not fit." if len(states) > 1 else "The expert file is gone.")
        return logits_NV


def test_texts_that_cannot_go_on_together_go_on_one_by_one(endless: ReadyModel) -> None:
    found = answers(Engine(endless, NarrowRunner(endless), maximum_requests=3), [asked(prompt, 6) for prompt in PROMPTS[:3]])
    assert found == [argmax_without_cache(endless, prompt, 6) for prompt in PROMPTS[:3]]


def test_a_text_that_cannot_go_on_alone_either_ends(endless: ReadyModel) -> None:
    runner = NarrowRunner(endless)
    engine = Engine(endless, runner, maximum_requests=2)
    expected = [argmax_without_cache(endless, prompt, 6) for prompt in PROMPTS[:2]]
    runner.gone = next(token for token in expected[0] if token not in expected[1])
    failing, good = run(engine, [engine.submit(asked(prompt, 6)) for prompt in PROMPTS[:2]])
    assert (failing[-1].finish_reason, failing[-1].message) == ("error", "The expert file is gone.")
    assert [event.token for event in good] == expected[1]


def test_a_failed_decode_ends_the_texts_in_it_and_no_others(endless: ReadyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(endless, 2)
    numbers = [engine.submit(asked(prompt, 4)) for prompt in PROMPTS[:3]]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(ModuleRunner, "decode", lambda *_: (_ for _ in ()).throw(InferenceError("A read error.")))
        failed = engine.step()
    assert [(event.request, event.finish_reason, event.message) for event in failed] == [(numbers[0], "error", "A read error.")]
    later = run(engine, numbers[1:])
    assert [[event.token for event in events] for events in later] == [argmax_without_cache(endless, prompt, 4) for prompt in PROMPTS[1:3]]


@pytest.mark.parametrize(
    ("tokens", "maximum", "message"),
    [
        ([], 4, "The prompt has no tokens: give at least one."),
        ([1, 512], 4, "The prompt has the token 512: the tokenizer has tokens from 0 to 511."),
        ([-1], 4, "The prompt has the token -1: the tokenizer has tokens from 0 to 511."),
        ([1], 0, "maximum_tokens = 0: must be at least 1."),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(ready: ReadyModel, tokens: list[int], maximum: int, message: str) -> None:
    engine = engine_of(ready)
    with pytest.raises(InferenceError, match=message.replace(".", r"\.")):
        engine.submit(asked(tokens, maximum))
    assert not engine.busy


def test_only_ids_that_the_tokenizer_has_are_generated(ready: ReadyModel) -> None:
    class Small(CharLevelTokenizer):
        vocab_size = 7

    small = replace(ready, tokenizer=Small())
    assert max(answers(engine_of(small), [asked([1], 20, Sampling(100.0))])[0]) < 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(dtype: torch.dtype) -> None:
    ready = replace(build_ready(lively_config(), dtype=dtype), tokenizer=NoEndTokenizer())
    assert [len(tokens) for tokens in answers(engine_of(ready, 2), [asked(PROMPT, 4), asked([90], 3)])] == [4, 3]


def test_a_seed_reproduces(ready: ReadyModel) -> None:
    first, again, other = (answers(engine_of(ready), [asked(PROMPT, 12, Sampling(1.0), seed=seed)]) for seed in (5, 5, 6))
    assert first == again != other


def test_a_request_gets_the_experts_of_every_token_that_the_model_read(ready: ReadyModel) -> None:
    def records(engine: Engine, *requests: Request) -> list[list[TokenRouting]]:
        events = run(engine, [engine.submit(request) for request in requests])
        return [[record for event in of for record in event.routing] for of in events]

    wanted = [replace(asked(prompt, 5), routing=True) for prompt in PROMPTS[:3]]
    lonely = [records(engine_of(ready), request)[0] for request in wanted]
    together = records(engine_of(ready, 4), wanted[0], asked(PROMPTS[3], 5), *wanted[1:])
    assert together == [lonely[0], [], *lonely[1:]]
    runner, trace = ModuleRunner(ready), RoutingTrace()
    runner.prefill(runner.open(20), PROMPT, trace)
    assert lonely[0][: len(PROMPT)] == trace.tokens()
    assert len(lonely[0]) == len(PROMPT) + 5 - 1
