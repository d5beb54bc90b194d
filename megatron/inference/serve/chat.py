"""A conversation as the prompt that the model was trained on: the chat template beside the tokenizer, which Hugging Face's library renders."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.tokenizer import Tokenizer
from megatron.data.tokenizer.companions import CONFIG, TOKENS, named_token, read_settings
from megatron.data.tokenizer.huggingface import RustTokenizer
from megatron.inference.serve.errors import ApiError

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class ChatTemplate:
    """A template in Jinja's language and the tokens that it may name."""

    text: str
    tokens: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The conversation up to where the model's answer begins, or without `add_generation_prompt` up to where its last message ends. Raises
        ApiError when the template refuses it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        conversation, ending = [dict(message) for message in messages], {"add_generation_prompt": add_generation_prompt}
        try:
            rendered = render(
                conversations=[conversation],
                chat_template=self.text,
                continue_final_message=not add_generation_prompt,
                **ending,
                **self.tokens,
            )
        except Exception as error:  # a template may raise anything, and does it to refuse a conversation
            raise ApiError(400, f"The model's chat template refuses this conversation: {error}.", param="messages") from None
        text: str = rendered[0][0] if isinstance(rendered, tuple) else rendered[0]
        return text


def find_template(folder: Path | None) -> ChatTemplate | None:
    """The default chat template in a tokenizer's folder. None: it has none, or there is no folder."""
    if folder is None:
        return None
    text = _template_text(folder)
    tokens = {name: token for name in TOKENS if (token := named_token(folder, name)) is not None}
    return None if text is None else ChatTemplate(text, tokens)


def _template_text(folder: Path) -> str | None:
    jinja, older = (folder / name for name in TEMPLATE_FILES)
    with contextlib.suppress(OSError, ValueError):
        return jinja.read_text(encoding="utf-8")
    stored = read_settings(older).get("chat_template", read_settings(folder / CONFIG).get("chat_template"))
    if isinstance(stored, list):  # several of them, by name
        named = {item.get("name"): item.get("template") for item in stored if isinstance(item, dict)}
        stored = named.get("default")
    return stored if isinstance(stored, str) else None


def encode_conversation(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a rendered conversation. The template has written all special tokens, so the tokenizer adds none."""
    return tokenizer.encode_alone(text) if isinstance(tokenizer, RustTokenizer) else tokenizer.encode(text)
