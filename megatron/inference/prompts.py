"""The sources of prompts: a file, a person, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from megatron.config import disk
from megatron.config.inference import InferenceConfig
from megatron.inference.errors import InferenceError

Source = Literal["input-file", "interactive", "unconditional"]
QUIT = "/quit"


def choose_source(inference: InferenceConfig, *, terminal: bool) -> Source:
    """`text_gen_type`. If it is not given: the input file if there is one, else a conversation at a terminal, else no prompts."""
    if inference.text_gen_type is not None:
        return inference.text_gen_type
    if inference.sample_input_file is not None:
        return "input-file"
    return "interactive" if terminal else "unconditional"


def read_prompts(path: Path, prompt_end: str) -> list[str]:
    """The prompts in a file, as NeoX splits them. Raises InferenceError when it cannot be read or holds none."""
    prompts = split_prompts(read_text(path, "sample_input_file"), prompt_end)
    if not prompts:
        raise InferenceError(f"sample_input_file: {path} holds no prompt; write each prompt with {prompt_end!r} (prompt_end) after it.")
    return prompts


def split_prompts(text: str, prompt_end: str) -> list[str]:
    """The pieces between `prompt_end`, stripped, without empty ones. If `prompt_end` is empty, the text is one prompt."""
    pieces = text.split(prompt_end) if prompt_end else [text]
    return [piece.strip() for piece in pieces if piece.strip()]


def read_text(path: Path, key: str) -> str:
    """The text of a UTF-8 file, unchanged, but without a byte order mark at its start. Raises InferenceError, which names the `key` of the file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InferenceError(f"{key}: {path} {what_is_no_text(error)}; convert it first.") from error
    except OSError as error:
        raise InferenceError(f"{key}: {path} cannot be read: {disk.reason(error)}.") from error


def what_is_no_text(error: UnicodeError) -> str:
    """`is not UTF-8 text (byte 3 is 0xff)`."""
    if not isinstance(error, UnicodeDecodeError):
        return "is not UTF-8 text"
    return f"is not UTF-8 text (byte {error.start:,} is {error.object[error.start]:#04x})"


def typed_prompts(read_line: Callable[[str], str], prompt_end: str) -> Iterator[str]:
    """Prompts as somebody types them, each ended by `prompt_end`, until /quit or the end of the input (EOFError from `read_line`).

    `read_line` is given the text to show before the line.
    """
    while True:
        lines: list[str] = []
        while True:
            try:
                line = read_line("... " if lines else "> ")
                line.encode()  # where Python reads another encoding than UTF-8, it keeps such bytes as halves of letters
            except EOFError:
                return
            except UnicodeError as error:
                raise InferenceError(f"Standard input {what_is_no_text(error)}: give UTF-8 text, or name a file with -i FILE.") from error
            if line.strip() == QUIT:
                return
            lines.append(line)
            typed = "\n".join(lines) + "\n"
            if not prompt_end or typed.endswith(prompt_end) or typed.rstrip("\n").endswith(prompt_end):
                break
        yield (typed.rstrip("\n").removesuffix(prompt_end) if prompt_end else typed).strip()
