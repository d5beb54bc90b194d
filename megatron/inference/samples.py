"""The outputs of generated text: a file with one JSON object on each line, and the screen."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.text import Text

from megatron.config import disk
from megatron.inference.continuation import Continuation
from megatron.inference.errors import InferenceError

VISIBLE_CONTROLS = "\n\t"


class SampleFile:
    """A new file of samples. Each sample is flushed as soon as it is written, so an interrupted run keeps its samples. A context manager.

    Raises InferenceError when the file cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 -- closed by __exit__
        except OSError as error:
            raise self._explained(error) from error

    def write(self, sample: Continuation) -> None:
        """One line."""
        try:
            self._file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._explained(error) from error

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as failure:  # tries again what `write` could not
            if error is None:
                raise self._explained(failure) from failure

    def _explained(self, error: OSError) -> InferenceError:
        return InferenceError(f"sample_output_file: {self.path} cannot be written: {disk.explained(error, self.path)}.")


def show(console: Console, sample: Continuation, *, number: int, total: int) -> None:
    """The prompt in bold with its continuation, below a line that says how it ended."""
    ending = sample.message or ("finished" if sample.finished else "cut off at maximum_tokens")
    console.print(Text(f"[{number}/{total}] {sample.length} tokens in {sample.duration_seconds:.1f} s, {ending}", "dim"), soft_wrap=True)
    console.print(Text.assemble((printable(sample.context), "bold"), printable(sample.text), "\n"), soft_wrap=True, highlight=False)


def printable(text: str) -> str:
    """The text with control characters replaced, so that a model cannot send commands to the terminal."""
    return "".join(c if c.isprintable() or c in VISIBLE_CONTROLS or ord(c) > 0x9F else "\ufffd" for c in text)
