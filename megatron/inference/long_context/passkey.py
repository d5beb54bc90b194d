"""Passkey retrieval: a number hidden in a long text, and the question for it (Mixtral of Experts, Jiang et al., 2024, figure 4, left).

The task and its sentences are those of "Landmark Attention" (Mohtashami and Jaggi, 2023), which Mixtral's figure measures.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table

from megatron.data.progress import Reporter
from megatron.inference.continuation import sample_generator
from megatron.inference.engine import Engine, Request
from megatron.inference.errors import InferenceError
from megatron.inference.sampling import Sampling

OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the important info there."
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"
KEYS = range(10_000, 50_000)
SPARE = 4
"""Tokens of the answer beyond the number itself."""


class Asked(NamedTuple):
    """What to measure."""

    lengths: tuple[int, ...]
    """Tokens of text and answer together."""
    depths: int
    trials: int
    seed: int


class Trial(NamedTuple):
    """One text."""

    length: int
    depth: float
    """Share of the filler before the number, 0 to 1."""
    key: str
    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Found:
    """How often the answer was right."""

    asked: Asked
    accuracy: dict[int, list[float]]
    """Length -> share of right answers at each depth."""
    examples: list[dict[str, Any]]
    """The first wrong answers."""

    def as_json(self) -> dict[str, Any]:
        """For the results file."""
        return {
            **self.asked._asdict(),
            "depth_percent": [100 * depth for depth in depths(self.asked)],
            "accuracy": self.accuracy,
            "wrong": self.examples,
        }


def depths(asked: Asked) -> list[float]:
    """Where the number is hidden: evenly from the beginning to the end; one depth is the middle."""
    return [0.5] if asked.depths == 1 else [place / (asked.depths - 1) for place in range(asked.depths)]


def find_passkeys(engine: Engine, asked: Asked, reporter: Reporter) -> Found:
    """Lets the model answer every question greedily. An answer is right if it begins with the number. Raises InferenceError."""
    trials = [trial for length in asked.lengths for trial in trials_of(engine, asked, length)]
    answers: dict[int, list[int]] = {}
    numbers = {}
    for index, trial in enumerate(trials):
        maximum = len(engine.ready.tokenizer.encode(f" {trial.key}")) + SPARE
        numbers[engine.submit(Request(trial.tokens, Sampling(), maximum, sample_generator(0, index)))] = index
    with reporter.stage("passkey retrieval", sum(len(trial.text.encode()) for trial in trials)) as stage:
        while engine.busy:
            for event in engine.step():
                if event.finish_reason == "error":
                    raise InferenceError(event.message)
                index = numbers[event.request]
                answers.setdefault(index, []).extend([] if event.token is None else [event.token])
                if event.finish_reason is not None:
                    stage.advance(len(trials[index].text.encode()), 1, len(trials[index].tokens))
    texts = [engine.ready.tokenizer.decode(answers[index]) for index in range(len(trials))]
    return judged(asked, trials, texts)


def judged(asked: Asked, trials: list[Trial], answers: list[str]) -> Found:
    """The share of right answers at each length and depth."""
    right: dict[tuple[int, float], list[bool]] = {}
    wrong = []
    for trial, answer in zip(trials, answers, strict=True):
        is_right = answer.strip().startswith(trial.key)
        right.setdefault((trial.length, trial.depth), []).append(is_right)
        if not is_right:
            wrong.append({"length": trial.length, "depth_percent": 100 * trial.depth, "key": trial.key, "answer": answer})
    accuracy = {length: [sum(right[length, depth]) / len(right[length, depth]) for depth in depths(asked)] for length in asked.lengths}
    return Found(asked, accuracy, wrong[:5])


def trials_of(engine: Engine, asked: Asked, length: int) -> Iterator[Trial]:
    """The texts of one length. Raises InferenceError where it is too short for the sentences, or too long for the model."""
    encode, window = engine.ready.tokenizer.encode, engine.ready.context_length
    room = length - len(encode(f" {KEYS[-1]}")) - SPARE
    least = len(encode(written(0, 0, str(KEYS[-1]))))
    if length > window:
        raise InferenceError(f"eval_passkey_lengths: {length:,} tokens, and the model has positions for {window:,} (max_position_embeddings).")
    if least > room:
        raise InferenceError(f"eval_passkey_lengths: {length:,} tokens; the sentences alone need {least + length - room:,} with this tokenizer.")
    most = fitting(lambda count: len(encode(written(count, 0, str(KEYS[-1])))) <= room)
    generator = random.Random(f"{asked.seed} {length}")
    for depth in depths(asked):
        for _ in range(asked.trials):
            key, count = str(generator.choice(KEYS)), most
            text = written(count, depth, key)
            while count and len(encode(text)) > room:  # another number, or another place, may need more tokens
                count -= 1
                text = written(count, depth, key)
            yield Trial(length, depth, key, text, encode(text))


def written(count: int, depth: float, key: str) -> str:
    """The text with `count` pieces of filler, a share `depth` of them before the number."""
    before = round(count * depth)
    return OPENING + FILLER * before + NEEDLE.format(key=key) + FILLER * (count - before) + QUESTION


def fitting(fits: Any) -> int:
    """The largest count that fits, by doubling and halving; 0 fits."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def remarks(found: Found) -> list[str]:
    """What a reader should know before believing the numbers."""
    every = [share for shares in found.accuracy.values() for share in shares]
    if not any(every):
        sentence = "Passkey retrieval: no answer was right, at any length. A model that was not trained to answer such a question gives no"
        return [f"{sentence} number; this says nothing about how far its attention reaches."]
    return []


def passkey_table(found: Found) -> Table:
    """A row for each length, a column for each depth."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tokens", justify="right")
    for depth in depths(found.asked):
        table.add_column(f"depth {100 * depth:.0f} %", justify="right")
    for length, shares in found.accuracy.items():
        table.add_row(f"{length:,}", *(f"{100 * share:.0f} %" for share in shares))
    return table
