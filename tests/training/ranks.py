"""Several processes of train.py as a launcher starts them, each with its own output: so a test sees what each of them says, and when it ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron.launcher.local import held_port, place
from tests.scripts import ScriptProcess
from tests.training.runs import outer_environment


@contextmanager
def started(values: Mapping[str, Any], folder: Path, world_size: int, **environment: str) -> Iterator[list[ScriptProcess]]:
    """The processes, in the order of the ranks. None of them outlives the block."""
    (file := folder / "run.json").write_text(json.dumps(dict(values)))
    ranks = []
    with held_port(0) as port:
        try:
            for rank in range(world_size):
                (own := folder / f"rank{rank}").mkdir(exist_ok=True)
                given = {**outer_environment(), **place(rank, world_size, port), **environment}
                ranks.append(ScriptProcess("train.py", str(file), folder=own, environment=given))
            yield ranks
        finally:
            for process in ranks:
                with suppress(ProcessLookupError):
                    os.kill(process.process.pid or 0, signal.SIGKILL)
                process.process.join()


def ended(ranks: Sequence[ScriptProcess], within: float) -> list[tuple[int | None, str]]:
    """(exit status, standard error) of each process, once all of them have ended. None: it was still there after `within` seconds."""
    end = time.monotonic() + within
    while any(process.poll() is None for process in ranks) and time.monotonic() < end:
        time.sleep(0.05)
    return [(process.poll(), process.outputs[1].read_text() if process.outputs[1].exists() else "") for process in ranks]
