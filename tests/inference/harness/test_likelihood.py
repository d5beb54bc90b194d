"""Log-likelihoods in batches against one row at a time, by the definition."""

from __future__ import annotations

import random

import pytest
import torch

from megatron.inference.errors import InferenceError
from megatron.inference.harness.forward import ReadyForward
from megatron.inference.harness.likelihood import Batching, Likelihood, score_parts, sum_parts
from megatron.inference.harness.requests import cut
from megatron.inference.model import ReadyModel


def by_definition(ready: ReadyModel, context: list[int], continuation: list[int]) -> Likelihood:
    logits_BSV = ready.gpt(torch.tensor([[*context, *continuation][:-1]])).logits_BSV
    logprob_SV = logits_BSV[0].double().log_softmax(-1)[len(context) - 1 :]
    values = [float(logprob_V[token]) for logprob_V, token in zip(logprob_SV, continuation, strict=True)]
    return Likelihood(sum(values), [int(logprob_V.argmax()) for logprob_V in logprob_SV] == continuation)


def requests(ready: ReadyModel) -> list[tuple[list[int], list[int]]]:
    """Contexts that are shared or not, continuations of several lengths; among them one that is what the model would say."""
    generator = random.Random(5)
    contexts = [[generator.randrange(1, 60) for _ in range(generator.randrange(1, 14))] for _ in range(4)]
    made = [(context, [generator.randrange(1, 60) for _ in range(length)]) for context in contexts for length in (1, 1, 3, 6)]
    likeliest = int(ready.gpt(torch.tensor([contexts[0]])).logits_BSV[0, -1].argmax())
    return [*made, (contexts[0], [likeliest]), (contexts[0], [likeliest, 7])]


@pytest.mark.parametrize("batching", [Batching(40), Batching(10_000), Batching(40, alone=True)], ids=["small", "one", "alone"])
def test_every_request_gets_its_own_likelihood(any_ready: ReadyModel, batching: Batching) -> None:
    asked = requests(any_ready)
    parts = [part for number, pair in enumerate(asked) for part in cut(number, *pair, any_ready.context_length)]
    counted: list[int] = []
    found = score_parts(ReadyForward(any_ready), parts, len(asked), batching=batching, progress=lambda done, tokens: counted.append(done))
    expected = [by_definition(any_ready, *pair) for pair in asked]
    assert [answer.logprob for answer in found] == pytest.approx([answer.logprob for answer in expected], abs=1e-4)
    assert [answer.greedy for answer in found] == [answer.greedy for answer in expected]
    assert found[-2].greedy
    assert sum(counted) == len(asked)
    losses = sum_parts(ReadyForward(any_ready), parts, len(asked), batching=batching, progress=lambda done, tokens: None)
    assert losses == pytest.approx([answer.logprob for answer in expected], abs=1e-4)


def test_a_model_that_gives_nan_is_said_so(ready: ReadyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadyForward, "logits", lambda self, tokens, chosen: torch.full((int(chosen.sum()), 8), float("nan")))
    with pytest.raises(InferenceError, match="NaN or infinite"):
        score_parts(ReadyForward(ready), list(cut(0, [1], [2], 8)), 1, batching=Batching(9), progress=lambda done, tokens: None)
