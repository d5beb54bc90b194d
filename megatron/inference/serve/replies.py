"""The JSON of answers, as OpenAI writes it: whole ones, and the parts of a stream. Nothing here waits or runs the model."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.data.tokenizer import Tokenizer
from megatron.inference.engine import Event
from megatron.inference.routing_trace import TokenRouting
from megatron.inference.serve.prompts import Prompt
from megatron.inference.text_stream import INCOMPLETE, TextStream

REASONS = {"stop": "stop", "length": "length", "context": "length"}
"""The engine's reason for the end -> OpenAI's."""


LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


@dataclass(frozen=True)
class Heading:
    """What every part of one answer repeats."""

    model: str
    kind: str
    """`chat.completion` or `text_completion`."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece."""
        return {**self._common(self.kind), "choices": list(choices), "usage": usage}

    def part(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """A part of a stream. usage None: it has none."""
        kind = f"{self.kind}.chunk" if self.is_chat else self.kind
        return {**self._common(kind), "choices": list(choices), **({} if usage is None else {"usage": usage})}

    def _common(self, kind: str) -> dict[str, Any]:
        return {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created, "model": self.model}


class Choice:
    """One answer, event by event. `add` gives what a stream sends; `whole` what an answer in one piece holds."""

    def __init__(self, heading: Heading, index: int, prompt: Prompt, tokenizer: Tokenizer, stops: frozenset[int]) -> None:
        self.heading, self.index, self.prompt = heading, index, prompt
        self.tokens: list[int] = []
        self._tokenizer, self._stops = tokenizer, stops
        self._pieces: list[str] = []
        self._length = 0
        self._logprobs: list[dict[str, Any]] = []
        self._routing: list[dict[str, Any]] = []
        self._position = 0
        self._read_text = TextStream(tokenizer)
        self._reason: str | None = None
        """None: the answer has not ended."""

    def opening(self, *, echo: bool) -> list[dict[str, Any]]:
        """The parts of a stream before the first event."""
        if self.heading.is_chat:
            return [self._chat_part({"role": "assistant", "content": ""}, None, None)]
        return [self._text_part(self.prompt.text, None, None, [])] if echo else []

    def add(self, event: Event) -> dict[str, Any] | None:
        """The part of a stream that an event is. None: there is nothing to show yet."""
        is_shown = event.token is not None and event.token not in self._stops
        self.tokens += [] if event.token is None else [event.token]
        logprob = self._logprob(event) if is_shown and event.logprob is not None else None
        routing = [self._record(record) for record in event.routing]
        self._pieces.append(event.text)
        self._length += len(event.text)
        self._logprobs += [] if logprob is None else [logprob]
        self._routing += routing
        reason = None if event.finish_reason is None else REASONS[event.finish_reason]
        self._reason = reason
        if not (event.text or reason or logprob or routing):
            return None
        logprobs = None if logprob is None else self._joined([logprob])
        if self.heading.is_chat:
            return self._chat_part({"content": event.text} if event.text or logprob else {}, logprobs, reason)
        return self._text_part(event.text, logprobs, reason, routing)

    def whole(self, *, echo: bool) -> dict[str, Any]:
        """The choice of an answer in one piece."""
        text = (self.prompt.text if echo else "") + "".join(self._pieces)
        logprobs = self._joined(self._logprobs) if self._logprobs else None
        if self.heading.is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self._reason}
        return self._text_part(text, logprobs, self._reason, self._routing)

    def _text_part(self, text: str, logprobs: Any, reason: str | None, routing: list[dict[str, Any]]) -> dict[str, Any]:
        choice = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**choice, "routing": routing} if routing else choice

    def _chat_part(self, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprob(self, event: Event) -> dict[str, Any]:
        """The form of the chat API, with the place of the token in the text."""
        assert event.token is not None
        chosen = self._named(event.token, event.logprob or 0.0)
        return {**chosen, "top_logprobs": [self._named(token, value) for token, value in event.alternatives], "offset": self._length}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        known = None if INCOMPLETE in text else list(text.encode())  # the bytes of a part of a character are not known here
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": known}

    def _joined(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.heading.is_chat:
            return {"content": [{name: value for name, value in entry.items() if name != "offset"} for entry in entries], "refusal": None}
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{item["token"]: item["logprob"] for item in entry["top_logprobs"]} for entry in entries],
            "text_offset": [entry["offset"] for entry in entries],
        }

    def _record(self, routing: TokenRouting) -> dict[str, Any]:
        """The experts of the next token that the model has read: of the prompt first, then of the answer."""
        position, length = self._position, len(self.prompt.tokens)
        token = self.prompt.tokens[position] if position < length else self.tokens[position - length]
        self._position += 1
        return {"position": position, "text": self._read_text.push(token), **routing._asdict()}


def usage(prompts: Sequence[Prompt], choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens that were read and written. A prompt counts once, however many answers it has."""
    read, written = sum(len(prompt.tokens) for prompt in prompts), sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
