"""From a request to the engine's requests: prompts as tokens, and how each of them is continued."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.data.tokenizer import TokenizerError
from megatron.inference.continuation import encode_prompt, sample_generator
from megatron.inference.engine import Request, check_tokens
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.sampling import Sampling
from megatron.inference.serve.chat import ChatTemplate, encode_conversation
from megatron.inference.serve.errors import ApiError, context_error
from megatron.inference.serve.protocol import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, Sampled

SEEDS = 2**63


@dataclass(frozen=True)
class Prompt:
    """One prompt: as text, for `echo`, and as tokens."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Limits:
    """What a prompt may have."""

    prompt_tokens: int
    context: int

    def check(self, prompt: Prompt, maximum_tokens: int | None) -> int:
        """The number of tokens that the answer may have. `maximum_tokens` None: as many as there is room for. Raises ApiError."""
        length, room = len(prompt.tokens), self.context - len(prompt.tokens)
        if room < 1:
            raise context_error(f"The model's context is {self.context:,} tokens, and the prompt has {length:,}. Give a shorter one.")
        if length > self.prompt_tokens:
            raise context_error(f"The prompt has {length:,} tokens, and this server takes at most {self.prompt_tokens:,}. Give a shorter one.")
        if maximum_tokens is not None and maximum_tokens > room:
            raise context_error(
                f"The model's context is {self.context:,} tokens. The prompt has {length:,}, so max_tokens can be at most {room:,}, and it is "
                f"{maximum_tokens:,}."
            )
        return room if maximum_tokens is None else maximum_tokens


def completion_prompts(ready: ReadyModel, request: CompletionRequest) -> list[Prompt]:
    """The prompts as tokens; an empty text is the end-of-document token. Raises ApiError."""
    return [_encoded(ready, given) for given in request.prompt]


def chat_prompt(ready: ReadyModel, template: ChatTemplate | None, request: ChatRequest) -> Prompt:
    """The conversation as tokens. Raises ApiError, also if the tokenizer has no template."""
    if template is None:
        raise ApiError(400, "This model's tokenizer has no chat template, so it cannot read messages. Use /v1/completions.", param="messages")
    text = template.render([message.model_dump(exclude_none=True) for message in request.messages])
    try:
        return Prompt(text, encode_conversation(ready.tokenizer, text))
    except (TokenizerError, InferenceError) as error:
        raise ApiError(400, str(error), param="messages") from None


def _encoded(ready: ReadyModel, given: str | list[int]) -> Prompt:
    try:
        if isinstance(given, str):
            return Prompt(given, encode_prompt(ready, given))
        check_tokens(given, ready.tokenizer.vocab_size)
    except (TokenizerError, InferenceError) as error:
        raise ApiError(400, str(error), param="prompt") from None
    return Prompt(ready.tokenizer.decode(given), given)


def sampling_of(request: Sampled) -> Sampling:
    """How tokens are chosen. The defaults are OpenAI's."""
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=request.top_k or 0,
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
    )


def engine_requests(request: Sampled, prompts: Sequence[Prompt], limits: Limits) -> list[Request]:
    """For each prompt as many engine requests as answers are wanted, in the order of the answers. Raises ApiError."""
    sampling = sampling_of(request)
    seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed % SEEDS
    routing = isinstance(request, CompletionRequest) and bool(request.return_routing)
    made: list[Request] = []
    for prompt in prompts:
        maximum = limits.check(prompt, _maximum_tokens(request, limits.context - len(prompt.tokens)))
        for _ in range(request.choices):
            generator = sample_generator(seed, len(made))
            made.append(Request(prompt.tokens, sampling, maximum, generator, tuple(request.stop), _logprobs(request), routing))
    return made


def _maximum_tokens(request: Sampled, room: int) -> int | None:
    """None: as many as there is room for."""
    if isinstance(request, ChatRequest):
        return request.max_tokens or request.max_completion_tokens
    return request.max_tokens or min(DEFAULT_COMPLETION_TOKENS, max(1, room))


def _logprobs(request: Sampled) -> int | None:
    """The number of alternatives that are wanted. None: no log probabilities."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs if isinstance(request, CompletionRequest) else None
