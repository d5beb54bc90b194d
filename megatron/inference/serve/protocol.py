"""The fields of OpenAI's requests. Every field acts or is refused with a sentence. `user` and its like are taken and not used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from megatron.config.components import did_you_mean

MAX_CHOICES = 128
MAX_ALTERNATIVES = 20
MAX_STOPS = 16
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for `max_tokens` of a completion."""
INERT: Mapping[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "store": (None, False),
    "metadata": (None, {}),
    "service_tier": (None, "auto", "default"),
}
"""Fields of OpenAI's that this server does not have -> the values that ask for nothing, which are accepted."""


def _whole(text: str) -> str:
    """A text of whole characters: tokenizers, templates and answers can hold no other."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half a character in it (a lone surrogate such as \\ud83d)") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


def _stop_list(value: Any) -> Any:
    """`stop` as a list."""
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings) or len(strings) > MAX_STOPS:
        raise ValueError(f"must be a string or a list of at most {MAX_STOPS} strings that are not empty")
    return strings


def _prompt(value: Any) -> Any:
    """`prompt` as a list of prompts, once it is known to be one of its four forms."""
    parts = [value] if isinstance(value, str) or _is_tokens(value) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) or _is_tokens(part) for part in parts):
        raise ValueError("must be a string, a list of strings, a list of token numbers, or a list of such lists; none of them empty lists")
    return [_whole(part) if isinstance(part, str) else part for part in parts]


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _content(value: Any) -> Any:
    """The text of a message, which may come in parts."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else []
    if not parts or not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        raise ValueError('must be a string, or a list of {"type": "text", "text": ...}; this server reads text only')
    return "".join(part["text"] for part in parts)


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(BaseModel):
    """What both kinds of requests have. None always means: the default."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stop_list)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    user: str | None = None

    @property
    def choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="before")
    @classmethod
    def _without_inert_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, harmless in INERT.items():
            if name in given and name not in cls.model_fields and given[name] not in harmless:
                raise ValueError(f"'{name}' is not supported by this server; leave it out")
        return {name: value for name, value in given.items() if name not in INERT or name in cls.model_fields}

    @model_validator(mode="after")
    def _hold_rules(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' needs stream: true")
        return self


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    return_routing: bool | None = None
    """Our own: with the experts and LoREs of every token."""

    @model_validator(mode="after")
    def _hold_completion_rules(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError(f"'best_of' = {self.best_of} is not supported by this server: it must equal n ({self.choices}), or be left out")
        if self.echo and self.logprobs is not None:
            raise ValueError("'echo' cannot be combined with logprobs: this server computes no log probabilities of the prompt")
        return self


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_content)]
    name: Text | None = None


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _hold_chat_rules(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None and self.max_tokens != self.max_completion_tokens:
            raise ValueError("'max_tokens' and 'max_completion_tokens' differ; give one of them")
        return self


def explain(problem: Mapping[str, Any], model: type[BaseModel]) -> tuple[str, str | None]:
    """(a sentence about the first problem that pydantic found in a request, the field that it is about; None: no single field is)."""
    place = [part for part in problem["loc"] if part != "body"]
    name = _path(place)
    if problem["type"] == "json_invalid":
        return f"The body is not JSON: {problem['ctx']['error']}.", None
    if problem["type"] == "extra_forbidden":
        known = [*model.model_fields, *INERT]
        return f"Unknown field '{name}'{did_you_mean(str(place[-1]), known) if len(place) == 1 else ''}.", name
    if not place and problem["type"] == "missing":
        return "The request has no body, and it needs one: a JSON object.", None
    if not name and problem["type"] == "model_attributes_type":
        return "The body must be a JSON object.", None
    if not name:
        return _sentence(_own_words(problem["msg"])), None
    if problem["type"] == "missing":
        return f"The field '{name}' is missing.", name
    given = repr(problem["input"])
    shown = given if len(given) <= 60 else given[:57] + "..."
    return f"'{name}' = {shown}: {_own_words(problem['msg'])}.", name


def _own_words(message: str) -> str:
    for start, instead in (("Value error, ", ""), ("Input should be ", "must be "), ("List should have ", "must have ")):
        message = instead + message.removeprefix(start) if message.startswith(start) else message
    return message.removesuffix(" after validation, not 0")


def _sentence(text: str) -> str:
    return f"{text}." if not text.endswith(".") else text


def _path(place: Sequence[str | int]) -> str:
    """`messages[2].content`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
