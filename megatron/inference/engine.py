"""Continuous batching: many requests share one model, and each may come and go at any time.

`step` does one unit of work: it reads a part of a prompt, or it adds one token to every running text. While prompts wait, the two take turns, so that
a long prompt does not stop the texts that run. There are no threads here and no files. What a request gets depends on the request alone, up to
rounding: its random numbers are its own.

Shapes: N texts; V the tokenizer's vocabulary.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.routing_trace import RoutingTrace, TokenRouting
from megatron.inference.runner import PREFILL_CHUNK, Runner, TextState
from megatron.inference.sampling import Sampling, choose_token
from megatron.inference.text_stream import StopStrings, TextStream

FinishReason = Literal["stop", "length", "context", "error"]
"""`stop`: the model ended the text, or a stop string came. `length`: maximum_tokens are there. `context`: the model's context is full. `error`: the
request failed."""


@dataclass(frozen=True)
class Request:
    """One prompt and how it is continued."""

    tokens: Sequence[int]
    """The prompt; at least one token."""
    sampling: Sampling
    maximum_tokens: int
    """Most tokens of the answer; at least 1."""
    generator: torch.Generator
    """The request's own random numbers, on the CPU."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    logprobs: int | None = None
    """How many of the most likely tokens are wanted with their log probabilities, beside the one that is chosen. None: no log probabilities."""
    routing: bool = False
    """Whether the experts of each token are wanted."""


class Event(NamedTuple):
    """What happened to one request: a new token, or its end."""

    request: int
    """What `submit` returned."""
    token: int | None = None
    """The chosen token; None where no token was chosen (an error, or no room in the context)."""
    text: str = ""
    """New text that can be shown: whole characters, without any part of a stop string."""
    finish_reason: FinishReason | None = None
    """None: more will come."""
    message: str = ""
    """A sentence for `context` and `error`."""
    logprob: float | None = None
    """log p(token) of the model before temperature, filters and penalty; None where none was asked for."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """(token, log p) of the most likely tokens, the most likely first."""
    routing: tuple[TokenRouting, ...] = ()
    """The experts of the tokens that the model has read for this event: with the first token the whole prompt, then the token before this one. So the
    last token of an answer has none. Empty where nobody asked, and without experts."""


class Engine:
    """Runs the requests that it is given. At most `maximum_requests` of them run at once, and the others wait in order."""

    def __init__(self, ready: ReadyModel, runner: Runner, *, maximum_requests: int) -> None:
        self.ready, self.maximum_requests = ready, maximum_requests
        self._runner = runner
        self._waiting: deque[_Text] = deque()
        self._reading: _Text | None = None
        self._running: list[_Text] = []
        self._numbers = itertools.count()
        self._has_read = False

    def submit(self, request: Request) -> int:
        """Adds a request and returns its number, which its events have. Raises InferenceError if the request makes no sense."""
        if not request.tokens:
            raise InferenceError("The prompt has no tokens: give at least one.")
        check_tokens(request.tokens, self.ready.tokenizer.vocab_size)
        if request.maximum_tokens < 1:
            raise InferenceError(f"maximum_tokens = {request.maximum_tokens}: must be at least 1.")
        text = _Text(next(self._numbers), request, self.ready)
        self._waiting.append(text)
        return text.number

    def cancel(self, number: int) -> None:
        """Drops a request and its memory: no event of it will come. Does nothing if it has ended."""
        self._waiting = deque(text for text in self._waiting if text.number != number)
        self._running = [text for text in self._running if text.number != number]
        if self._reading is not None and self._reading.number == number:
            self._reading = None

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._waiting or self._running or self._reading is not None)

    def step(self) -> list[Event]:
        """Does one unit of work; nothing if there is none. Gives at most one event for each request.

        A request that fails ends with an `error` event: the others go on. The failures are those that say what the user can do (ValueError).
        """
        if self._reading is None and self._waiting and len(self._running) < self.maximum_requests:
            self._reading = self._waiting.popleft()
        if self._reading is not None and not (self._has_read and self._running):
            self._has_read = True
            return self._read(self._reading)
        self._has_read = False
        return self._decode(self._running) if self._running else []

    def _read(self, text: _Text) -> list[Event]:
        """Reads the next part of a prompt. After the last part, the text has its first token."""
        prompt = text.request.tokens
        if text.capacity <= len(prompt):
            self._reading = None
            return [text.without_room()]
        try:
            if text.state is None:
                text.state = self._runner.open(text.capacity)
            part = prompt[text.state.length : text.state.length + PREFILL_CHUNK]
            trace = RoutingTrace() if text.request.routing else None
            logits_V = self._runner.prefill(text.state, part, trace)
        except ValueError as error:
            self._reading = None
            return [text.failed(error)]
        text.routing += [] if trace is None else trace.tokens()
        if text.state.length < len(prompt):
            return []
        self._reading = None
        self._running.append(text)
        return self._extend([text], logits_V[None])

    def _decode(self, texts: Sequence[_Text]) -> list[Event]:
        """Adds one token to each of the texts. If that fails for all together, each is tried alone: a token of many texts may need more experts than
        there is room for."""
        states = [text.state for text in texts if text.state is not None]
        lengths = [state.length for state in states]
        trace = RoutingTrace() if any(text.request.routing for text in texts) else None
        try:
            logits_NV = self._runner.decode(states, [text.last for text in texts], trace)
        except ValueError as error:
            if len(texts) == 1:
                self._running = [text for text in self._running if text is not texts[0]]
                return [texts[0].failed(error)]
            for state, length in zip(states, lengths, strict=True):
                state.length = length
            return [event for text in texts for event in self._decode([text])]
        for text, record in zip(texts, [] if trace is None else trace.tokens(), strict=False):  # there are no records without experts
            text.routing += [record] if text.request.routing else []
        return self._extend(texts, logits_NV)

    def _extend(self, texts: Sequence[_Text], logits_NV: Tensor) -> list[Event]:
        finite_N = logits_NV.sum(-1).isfinite().tolist()  # a sum with an infinity or NaN in it is not finite either
        events = [
            text.extend(logits_V) if finite else text.failed(not_finite(self.ready))
            for text, logits_V, finite in zip(texts, logits_NV, finite_N, strict=True)
        ]
        ended = {event.request for event in events if event.finish_reason is not None}
        self._running = [text for text in self._running if text.number not in ended]
        return events


class _Text:
    """A request and its answer so far."""

    def __init__(self, number: int, request: Request, ready: ReadyModel) -> None:
        self.number, self.request, self._ready = number, request, ready
        self.state: TextState | None = None
        """None until the prompt is read."""
        self.capacity = min(len(request.tokens) + request.maximum_tokens, ready.context_length)
        """Most tokens of prompt and answer."""
        self.last = -1
        """The newest token, which the model has not seen yet; -1 until the prompt is read."""
        self.answered = 0
        """Tokens of the answer."""
        self._tokens_T = torch.empty(max(self.capacity, len(request.tokens)), dtype=torch.int64, device=ready.device)
        self._tokens_T[: len(request.tokens)] = torch.tensor(request.tokens)
        self.routing: list[TokenRouting] = []
        """The experts of tokens that no event has told yet."""
        self._stream, self._stops = TextStream(ready.tokenizer), StopStrings(request.stop)

    def extend(self, logits_V: Tensor) -> Event:
        """Chooses the next token."""
        request = self.request
        length = len(request.tokens) + self.answered
        token = choose_token(logits_V, request.sampling, request.generator, self._tokens_T[:length], prompt=len(request.tokens))
        logprob, alternatives = (None, ()) if request.logprobs is None else log_probabilities(logits_V, token, request.logprobs)
        self._tokens_T[length] = self.last = token
        self.answered += 1
        text, reason, message = self._follow(token)
        routing, self.routing = tuple(self.routing), []
        return Event(self.number, token, text, reason, message, logprob, alternatives, routing)

    def _follow(self, token: int) -> tuple[str, FinishReason | None, str]:
        """(new text, why the answer ends here, a sentence about it)."""
        is_end = token in self._ready.stop_tokens
        is_full = self.answered == self.request.maximum_tokens or len(self.request.tokens) + self.answered == self.capacity
        text = "" if is_end else self._stops.push(self._stream.push(token))
        if is_end or is_full:
            text += self._stops.push(self._stream.finish()) + self._stops.finish()
        if is_end or self._stops.found:
            return text, "stop", ""
        if not is_full:
            return text, None, ""
        if self.answered == self.request.maximum_tokens:
            return text, "length", ""
        return text, "context", self._why_short(self.answered)

    def without_room(self) -> Event:
        """The end of a request whose prompt fills the context."""
        return Event(self.number, finish_reason="context", message=self._why_short(0))

    def failed(self, error: ValueError) -> Event:
        """The end of a request that failed."""
        return Event(self.number, finish_reason="error", message=str(error))

    def _why_short(self, length: int) -> str:
        prompt, context = len(self.request.tokens), self._ready.context_length
        if length == 0:
            return f"the prompt has {prompt:,} tokens and the model's context {context:,} (seq_length): there is no room for an answer"
        return f"prompt ({prompt:,} tokens) and answer ({length:,}) fill the model's context of {context:,} tokens (seq_length)"


def check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    """Raises InferenceError for a token that a tokenizer of this vocabulary does not have."""
    if (wrong := next((token for token in tokens if not 0 <= token < vocabulary), None)) is not None:
        raise InferenceError(f"The prompt has the token {wrong}: the tokenizer has tokens from 0 to {vocabulary - 1:,}.")


def log_probabilities(logits_V: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """(log p of `token`, the `count` most likely tokens with theirs)."""
    logprob_V = logits_V.log_softmax(0)
    values, tokens = logprob_V.topk(min(count, len(logprob_V)))
    return float(logprob_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def not_finite(ready: ReadyModel) -> InferenceError:
    """The error for logits that are not numbers."""
    return InferenceError(
        f"The model in {ready.path} gives NaN or infinite numbers: its training diverged, or the range of {ready.dtype} is too small for it."
    )
