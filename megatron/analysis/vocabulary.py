"""The number of tokens in a configuration's vocabulary, without a run: from its tokenizer, or from the comment at the top of the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from megatron.config.data import DataConfig
from megatron.data.tokenizer import NULL, TokenizerError, build_tokenizer

# The shipped files: "# Parameters: N with a vocabulary of V (X's 50,257 tokens, padded)".
_STATED = re.compile(r"^# Parameters: .* with a vocabulary of [\d,]+ \(.+'s ([\d,]+) tokens", re.MULTILINE)


class Vocabulary(NamedTuple):
    """Entries of the tokenizer, or None with the reason why they cannot be counted."""

    size: int | None
    reason: str


def vocabulary(data: DataConfig) -> Vocabulary:
    """The number of tokens of the configured tokenizer. Its file need not exist yet, and nothing is downloaded."""
    if data.tokenizer_type not in ("CharLevelTokenizer", NULL):
        if data.vocab_file is None:
            return Vocabulary(None, "vocab_file is not given")
        if not Path(data.vocab_file).exists():
            return Vocabulary(None, f"vocab_file '{data.vocab_file}' does not exist yet")
    try:
        return Vocabulary(build_tokenizer(data).vocab_size, "")
    except TokenizerError as error:
        return Vocabulary(None, str(error))


def stated_vocabulary(text: str) -> int | None:
    """The number of tokens that the comment at the top of a shipped configuration names. None: it names none."""
    found = _STATED.search(text)
    return int(found.group(1).replace(",", "")) if found else None
