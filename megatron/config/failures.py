"""The tracebacks of the processes of a run, for the launcher: it repeats the first one when all processes have ended.

They are files in a folder that the launcher names in the environment. torchrun has a file of its own for each process.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path

FOLDER = "MEGATRON_FAILURES"
TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"


def note_failure(error: BaseException) -> None:
    """Writes the traceback of this process where its launcher looks for it. Does nothing without such a launcher."""
    text, moment, rank = "".join(traceback.format_exception(error)), time.time(), os.environ.get("RANK", "0")
    if folder := os.environ.get(FOLDER):
        _write(Path(folder) / f"{rank}.json", {"rank": rank, "moment": moment, "text": text})
    if file := os.environ.get(TORCHRUN_FILE):
        extra = {"py_callstack": text, "timestamp": str(int(moment))}
        _write(Path(file), {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}})


def first_failure(folder: Path) -> str | None:
    """What failed first, with its traceback. None: no process has left one."""
    failures = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    if not failures:
        return None
    first = min(failures, key=lambda failure: float(failure["moment"]))
    others = f" ({len(failures) - 1} more failed too)" if len(failures) > 1 else ""
    return f"Process {first['rank']} failed first{others}. Its traceback:\n{first['text'].rstrip()}"


def _write(file: Path, values: object) -> None:
    try:
        file.write_text(json.dumps(values))
    except OSError:  # the traceback is on standard error as well
        return
