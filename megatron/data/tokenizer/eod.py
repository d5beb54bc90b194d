"""Which token of a vocabulary ends a document."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Ends of text by name. The first two end a document whatever a chat template makes of `eos_token`, so they go before it; the rest comes after it.
BEFORE_CONFIG = ("<|endoftext|>", "<|end_of_text|>")
AFTER_CONFIG = ("</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS_TOKEN>", "<｜end▁of▁sentence｜>")
CONFIG = "tokenizer_config.json"


def find_end_of_document(token_to_id: Callable[[str], int | None], folder: Path) -> int | None:
    """The id of <|endoftext|> (NeoX's only rule) or <|end_of_text|> (Llama 3), else of the `eos_token` in the `tokenizer_config.json` of `folder`,
    else of another usual name. None: the vocabulary has none of them."""
    configured = eos_token(folder)
    names = (*BEFORE_CONFIG, *([configured] if configured else []), *AFTER_CONFIG)
    ids = (token_to_id(name) for name in names)
    return next((number for number in ids if number is not None), None)


def eos_token(folder: Path) -> str | None:
    """`eos_token` of Hugging Face's tokenizer_config.json, written as a string or as a dictionary. None: no such file, or it names none."""
    content: Any = None
    with contextlib.suppress(OSError, ValueError):  # a file that is not JSON belongs to something else
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    value = content.get("eos_token") if isinstance(content, dict) else None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
