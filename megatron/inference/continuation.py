"""Continues prompts: text in, text out, several at once."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron.data.tokenizer.lost import LossFinder, lost_text
from megatron.inference.engine import Engine, Event, FinishReason, Request
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.sampling import Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuation:
    """The result of one prompt, under NeoX's names and one of our own.

    length: generated tokens, without the one that ended the text. finished: whether the text has an end: the model's own, or a stop string. message:
    why there is less text than was asked for, or None. finish_reason: `stop`, `length` or `context`.
    """

    context: str
    text: str
    length: int
    finished: bool
    message: str | None
    duration_seconds: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class Manner:
    """How prompts are continued."""

    sampling: Sampling
    maximum_tokens: int
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    context: str
    tokens: list[int]
    index: int
    """Its number among the samples. It decides the random numbers, together with the seed."""

    def request(self, manner: Manner) -> Request:
        """The request that continues this prompt."""
        return Request(self.tokens, manner.sampling, manner.maximum_tokens, sample_generator(manner.seed, self.index), manner.stop)


def complete(engine: Engine, prompts: Iterable[Prompt], manner: Manner, *, on_text: Callable[[str], None] | None = None) -> Iterator[Continuation]:
    """Continues prompts, as many at once as the engine takes, and gives the results in the order of the prompts. `on_text` is called with each new
    piece of text. None: nothing is called.

    Raises InferenceError when a request fails.
    """
    coming, answers = iter(prompts), deque[_Answer]()
    while True:
        open_answers = {answer.number: answer for answer in answers if answer.result is None}
        while len(open_answers) < engine.maximum_requests and (prompt := next(coming, None)) is not None:
            answers.append(_Answer(prompt, engine.submit(prompt.request(manner))))
            open_answers[answers[-1].number] = answers[-1]
        if not answers:
            return
        try:
            events = engine.step()
        except KeyboardInterrupt:
            yield from (answer.result for answer in answers if answer.result is not None)  # they wait for an earlier prompt
            raise
        for event in events:
            open_answers[event.request].add(event, engine.ready)
            if event.text and on_text is not None:
                on_text(event.text)
        while answers and (result := answers[0].result) is not None:
            answers.popleft()
            yield result


class _Answer:
    """The events of one request, collected."""

    def __init__(self, prompt: Prompt, number: int) -> None:
        self.number, self._prompt = number, prompt
        self.result: Continuation | None = None
        """None until the last event."""
        self._pieces: list[str] = []
        self._length, self._started = 0, time.perf_counter()

    def add(self, event: Event, ready: ReadyModel) -> None:
        """Raises InferenceError if the request failed."""
        if event.finish_reason == "error":
            raise InferenceError(event.message)
        self._pieces.append(event.text)
        self._length += event.token is not None and event.token not in ready.stop_tokens
        if event.finish_reason is not None:
            self.result = Continuation(
                context=self._prompt.context,
                text="".join(self._pieces),
                length=self._length,
                finished=event.finish_reason == "stop",
                message=event.message or None,
                duration_seconds=time.perf_counter() - self._started,
                finish_reason=event.finish_reason,
            )


def encode_prompt(ready: ReadyModel, prompt: str) -> list[int]:
    """The prompt's tokens; the end-of-document token for an empty one. Raises InferenceError when the tokenizer has none."""
    tokens = ready.tokenizer.encode(prompt)
    if lost := LossFinder(ready.tokenizer).find(prompt, tokens):
        if not tokens:
            raise InferenceError(f"The tokenizer has no tokens for the prompt {prompt!r}: write it with characters that the tokenizer has.")
        log.warning("The tokenizer has no tokens for %s of the prompt, so the model does not see them.", lost_text(lost))
    if tokens:
        return tokens
    if ready.tokenizer.eod is None:
        raise InferenceError(
            "The tokenizer has no end-of-document token, so a text cannot start without a prompt. Give a prompt (sample_input_file)."
        )
    return [ready.tokenizer.eod]


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of sample `index`. They depend on these two numbers alone, and not on earlier samples."""
    state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)
