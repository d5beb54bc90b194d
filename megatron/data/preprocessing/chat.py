"""Conversations to token ids by a tokenizer's chat template, with labels on what one of the speakers says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.data.indexed import DatasetError
from megatron.data.input.bad_input import Kind, OnProblem, Problem
from megatron.data.input.reading import Record, name_of_type
from megatron.data.preprocessing.encode import IGNORED, Encoded, Unusable, column, find_lost, load_ftfy
from megatron.data.preprocessing.preprocess import Output
from megatron.data.tokenizer import TokenizerError
from megatron.data.tokenizer.eod import choose_end
from megatron.data.tokenizer.huggingface import RustTokenizer
from megatron.data.tokenizer.lost import LossFinder

Turn = dict[str, Any]
LABEL_DTYPE = np.dtype("<i4")
REWARD_DTYPE = np.dtype("<f8")


class CannotMask(ValueError):
    """The template refuses the conversation, or its text does not show which role wrote which part."""


class Written(NamedTuple):
    """A conversation as text, and the ranges of its characters to learn. `fault` says why there is no text."""

    text: str = ""
    spoken: Sequence[tuple[int, int]] = ()
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChatTask:
    """Turns records into columns. A record is (one conversation for each key; rewards). The columns of a key are its tokens, its labels unless
    `mask` is
    off, and its rewards if `rewards` is on.

    A token is its own label where `generation_role` speaks (`only_last`: in its last turn only); elsewhere the label is IGNORED. The end-of-document
    token that closes a conversation is labelled like the token before it. `for_rm`: only that token is labelled.
    """

    tokenizer_path: str
    generation_role: str = "assistant"
    mask: bool = True
    only_last: bool = False
    for_rm: bool = False
    ftfy: bool = False
    rewards: bool = False
    trust_remote_code: bool = False
    """Allows Python code of the tokenizer's folder to run, if its tokenizer_config.json names some."""

    def start(self) -> Callable[[Sequence[tuple[tuple[list[Turn], ...], list[float]]]], Encoded]:
        return ChatEncoder(self)


@dataclass(frozen=True)
class ChatJob:
    """Reads a conversation under each key of `conversations`. `reward_key` None: there are no rewards. `binary_reward`: 1 for true values, -1 for
    others."""

    conversations: tuple[str, ...]
    task: ChatTask
    reward_key: str | None
    binary_reward: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.conversations, *([] if self.reward_key is None else [self.reward_key]))

    @property
    def outputs(self) -> tuple[Output, ...]:
        outputs = []
        for key in self.conversations:
            outputs.append(Output(key, LABEL_DTYPE))
            outputs += [Output(f"{key}_label", LABEL_DTYPE, counts=False)] if self.task.mask else []
            outputs += [Output(f"{key}_reward", None, counts=False)] if self.task.rewards else []
        return tuple(outputs)

    def payload(self, record: Record, on_problem: OnProblem) -> tuple[Any, int] | None:
        value = record.value if isinstance(record.value, dict) else {}
        for key in self.keys:
            if key not in value:
                on_problem(Problem(Kind.NO_KEY, record.origin, f"no key {key!r}"))
                return None
        for key in self.conversations:
            problem = fault_in(value[key])
            if problem:
                on_problem(Problem(Kind.NO_CHAT, record.origin, f"the value of {key!r} is not a conversation: {problem}"))
                return None
        rewards = [] if self.reward_key is None else self.rewards_of(value[self.reward_key])
        if rewards is None:
            what = f"the value of {self.reward_key!r} is {name_of_type(value[str(self.reward_key)])}, not a finite number or a list of finite numbers"
            on_problem(Problem(Kind.NO_REWARD, record.origin, what))
            return None
        size = sum(len(turn["content"].encode()) for key in self.conversations for turn in value[key])
        return (tuple(value[key] for key in self.conversations), rewards), size

    def rewards_of(self, value: Any) -> list[float] | None:
        """The rewards of a value. None: it is not a reward."""
        if self.binary_reward:
            return [1 if value else -1]
        values = value if isinstance(value, list) and value else [value]
        fine = all(isinstance(number, int | float) and math.isfinite(number) for number in values)
        return [float(number) for number in values] if fine else None


def chat_job(task: ChatTask, keys: tuple[str, ...], reward_key: str | None, *, binary_reward: bool) -> ChatJob:
    """Raises TokenizerError or DatasetError for keys and options that cannot be used."""
    job = ChatJob(keys, task, reward_key, binary_reward)
    names = [output.name for output in job.outputs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DatasetError(f"--jsonl-keys {' '.join(keys)}: {twice!r} would also be the name of another key's output; rename the key in the input")
    ChatEncoder(task)
    return job


def fault_in(conversation: Any) -> str | None:
    """What is wrong with a list of {"role": ..., "content": ...}; None: nothing."""
    if not isinstance(conversation, list) or not conversation:
        return 'it has to be a list of turns, each {"role": ..., "content": ...}'
    for number, turn in enumerate(conversation, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            return f'turn {number} has to be {{"role": ..., "content": ...}} with two strings'
        try:
            turn["content"].encode()
        except UnicodeEncodeError:
            return f"turn {number} has half a character (a lone surrogate such as \\ud83d) in it"
    return None


def load_chat_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """A tokenizer of the transformers library. Raises TokenizerError, also if it has no chat template or needs code that is not trusted."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            file = Path(path) / "tokenizer_config.json"
            raise TokenizerError(
                f"--tokenizer-path {path}: {file if file.exists() else 'it'} names Python code of its own (auto_map), which does not run without "
                "your consent. If you have read it and trust it, add --trust-remote-code."
            ) from None
        where = "a folder without a tokenizer that transformers can read" if Path(path).is_dir() else "neither a folder nor a tokenizer on the hub"
        raise TokenizerError(f"--tokenizer-path {path} is {where} ({str(error).splitlines()[0]})") from None
    if not tokenizer.chat_template:
        raise TokenizerError(
            f"--tokenizer-path {path} has no chat template: no chat_template in its tokenizer_config.json and no chat_template.jinja; "
            "take the tokenizer of a chat model, or add one there"
        )
    if not tokenizer.is_fast:
        raise TokenizerError(f"--tokenizer-path {path} does not say where in the text a token stands; it needs a tokenizer.json")
    return tokenizer


def document_end(tokenizer: Any) -> int | None:
    """The token that ends a document. In a chat model this is not the `eos_token`, which ends a turn. None: the tokenizer has neither token."""
    vocabulary = tokenizer.get_vocab()
    template = tokenizer.chat_template
    return choose_end(vocabulary.get, tokenizer.eos_token, template if isinstance(template, str) else "\n".join(map(str, template.values())))


class ChatEncoder:
    def __init__(self, task: ChatTask) -> None:
        self._task = task
        self._tokenizer = load_chat_tokenizer(task.tokenizer_path, trust_remote_code=task.trust_remote_code)
        self._fix = load_ftfy() if task.ftfy else None
        self._finder = LossFinder(RustTokenizer(self._tokenizer.backend_tokenizer, Path(task.tokenizer_path)))
        self._turn_end: int | None = self._tokenizer.eos_token_id
        self._end = document_end(self._tokenizer) if self._turn_end is not None else None
        if task.for_rm and self._end is None:
            raise TokenizerError(
                f"--for-rm labels the end-of-sequence token, and {task.tokenizer_path} has none (eos_token in tokenizer_config.json)"
            )

    def __call__(self, batch: Sequence[tuple[tuple[list[Turn], ...], list[float]]]) -> Encoded:
        unusable: list[Unusable] = []
        written = [[self._written(conversation) for conversation in conversations] for conversations, _ in batch]
        for row, conversations in enumerate(written):
            fault = next((conversation.fault for conversation in conversations if conversation.fault), None)
            if fault is not None:
                unusable.append(Unusable(row, Kind.NO_CHAT, fault))
                written[row] = [Written() for _ in conversations]
        unused = {row for row, _, _ in unusable}
        rewards = [[] if row in unused else values for row, (_, values) in enumerate(batch)]
        columns = []
        lost: dict[int, Counter[str]] = {}
        for of_key in zip(*written, strict=True):
            tokens, labels = self._encode(of_key)
            for row, pieces in find_lost(self._finder, [[conversation.text for conversation in of_key]], [tokens]):
                lost.setdefault(row, Counter()).update(pieces)
            columns.append(column(tokens, LABEL_DTYPE))
            columns += [column(labels, LABEL_DTYPE)] if self._task.mask else []
            columns += [column(rewards, REWARD_DTYPE)] if self._task.rewards else []
        return Encoded(columns, unusable, sorted(lost.items()))

    def _encode(self, conversations: Sequence[Written]) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens and labels. A token belongs to the range of text that it ends in."""
        encodings = self._tokenizer([written.text for written in conversations], add_special_tokens=False, return_offsets_mapping=True)
        tokens, labels = [], []
        for written, ids, offsets in zip(conversations, encodings["input_ids"], encodings["offset_mapping"], strict=True):
            ends_T = np.array(offsets, np.int64).reshape(-1, 2)[:, 1]
            spoken_T = np.zeros(len(ids), bool)
            for start, end in written.spoken:
                spoken_T |= (ends_T > start) & (ends_T <= end)
            close = self._close(ids) if written.text else []
            tokens.append([*ids, *close])
            if self._task.for_rm:
                labels.append([IGNORED] * (len(tokens[-1]) - 1) + tokens[-1][-1:])
            else:
                closed = close if spoken_T[-1:].any() else [IGNORED] * len(close)
                labels.append([*np.where(spoken_T, ids, IGNORED).tolist(), *closed])
        return tokens, labels

    def _close(self, ids: Sequence[int]) -> list[int]:
        """What comes after a conversation: the end of a document, unless the template wrote it; before it the token that ends a turn, where the
        template never writes that one and so nothing else would teach it."""
        if self._end is None or (ids and ids[-1] == self._end):
            return []
        turn = [] if self._turn_end is None or self._turn_end == self._end or self._turn_end in ids else [self._turn_end]
        return [*turn, self._end]

    def _written(self, conversation: list[Turn]) -> Written:
        if self._fix is not None:
            conversation = [{**turn, "content": self._fix(turn["content"])} for turn in conversation]
        try:
            text = self._render(conversation)
            return Written(text, self._spoken(conversation, text) if self._task.mask and not self._task.for_rm else [])
        except CannotMask as error:
            return Written(fault=str(error))

    def _spoken(self, conversation: list[Turn], text: str) -> list[tuple[int, int]]:
        """Where in `text` the generation role speaks: from where its turn is asked for to where the next one's begins."""
        role, last = self._task.generation_role, len(conversation) - 1
        speaks = [turn["role"] == role for turn in conversation]
        ranges = []
        for number in range(last + 1):
            if speaks[number] and (number == last or not self._task.only_last):
                start = self._length_of(conversation[:number], text, ask=True) if number else 0
                end = len(text) if number == last else self._length_of(conversation[: number + 1], text, ask=speaks[number + 1])
                ranges.append((start, end))
        return ranges

    def _length_of(self, beginning: list[Turn], text: str, *, ask: bool) -> int:
        """Characters of the first turns; `ask`: with the words that ask for the next one, where the template asks for a turn of that role and writes
        the same words later."""
        starts = [self._render(beginning, ask=True)] if ask else []
        for start in (*starts, self._render(beginning)):
            if text.startswith(start):
                return len(start)
        raise CannotMask(
            f"the chat template writes the first {len(beginning)} turn(s) of this conversation differently when more turns follow, so the text of "
            f"{self._task.generation_role!r} cannot be found. Try --only-last or --no-mask, or a template without such changes"
        )

    def _render(self, conversation: list[Turn], *, ask: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask)
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise CannotMask(f"the chat template refuses it: {error}") from None
        if not text:
            raise CannotMask("the chat template gives no text for it")
        return text
