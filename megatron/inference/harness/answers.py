"""Generated answers: the harness's settings as ours, and many requests at once through the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.inference.continuation import sample_generator
from megatron.inference.engine import Engine, Request
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.sampling import Sampling
from megatron.mpu.groups import Group

log = logging.getLogger(__name__)
LONGEST_ANSWER = 256
"""Tokens of an answer if the task does not say it, as in the harness's own backend for Hugging Face models."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The harness's names for the longest answer; the first one that is given counts."""
WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Settings of transformers that a task may spell out, with the only value that is possible here."""


@dataclass(frozen=True)
class Question:
    """One request to generate."""

    tokens: list[int]
    sampling: Sampling
    maximum_tokens: int
    stop: tuple[str, ...]
    wanted: int
    """The longest answer that the task asks for."""


def question(ready: ReadyModel, context: list[int], settings: Mapping[str, Any]) -> Question:
    """A request of a task. The context loses its beginning where the model has no room for it and the longest answer.

    Raises InferenceError for a setting that means something else here.
    """
    left = dict(settings)
    lengths = [left.pop(name, None) for name in LENGTHS]
    wanted = next((int(length) for length in lengths if length is not None), LONGEST_ANSWER)
    stop = left.pop("until", None) or []
    temperature, sample = float(left.pop("temperature", 0.0) or 0.0), left.pop("do_sample", None)
    sampling = Sampling(
        temperature=0.0 if sample is False else temperature,
        top_k=int(left.pop("top_k", 0) or 0),
        top_p=float(left.pop("top_p", 0.0) or 0.0),
        min_p=float(left.pop("min_p", 0.0) or 0.0),
        repetition_penalty=float(left.pop("repetition_penalty", 1.0)),
    )
    unknown = {name: value for name, value in left.items() if value is not None and WITHOUT_EFFECT.get(name) != value}
    if unknown:
        raise InferenceError(f"eval_tasks: a task generates with {unknown}, which this program does not have. Export the model and use lm-eval's hf.")
    window = ready.context_length
    length = min(wanted, window // 2) if wanted >= window else wanted
    return Question(context[-(window - length) :], sampling, length, (stop,) if isinstance(stop, str) else tuple(stop), wanted)


def generate_answers(engine: Engine, questions: Sequence[Question], group: Group, done: Callable[[int, int], None]) -> list[str]:
    """The text of each answer up to the first stop string or the end of the text. `done` is called with the answers and tokens since its last call.

    The longest questions come first. Each process of `group` answers a part of them, and gets all answers. Raises InferenceError where a request
    fails.
    """
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].tokens))[group.rank :: group.size]
    tokens: dict[int, list[int]] = {index: [] for index in order}
    numbers = {engine.submit(_request(questions[index], index)): index for index in order}
    while engine.busy:
        for event in engine.step():
            index = numbers[event.request]
            if event.finish_reason == "error":
                raise InferenceError(event.message)
            if event.token is not None and event.token not in engine.ready.stop_tokens:
                tokens[index].append(event.token)
            if event.finish_reason is not None:
                done(group.size, len(tokens[index]))
    own = {index: _cut(engine.ready.tokenizer.decode(answer), questions[index].stop) for index, answer in tokens.items()}
    everything = [own]
    if group.size > 1:
        everything = [{} for _ in group.ranks]
        torch.distributed.all_gather_object(everything, own, group=group.handle)
    answers = {index: answer for part in everything for index, answer in part.items()}
    return [answers[index] for index in range(len(questions))]


def _request(question: Question, index: int) -> Request:
    return Request(question.tokens, question.sampling, question.maximum_tokens, sample_generator(0, index), question.stop)


def _cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the first of the stop strings."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text
