"""A file that one process writes at a time, however its writer ends. Locks are between processes, so another process takes part."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import DatasetError, IndexedDataset, IndexedDatasetWriter
from megatron.data.locking import open_locked
from megatron.data.staging import staging_folder
from tests.data.conftest import write

HOLDER = """
    import os, sys, time
    from pathlib import Path
    import numpy as np
    from megatron.data.indexed import IndexedDatasetWriter
    from megatron.data.staging import staging_folder
    folder = Path(sys.argv[1])
    with IndexedDatasetWriter(folder / "text", np.dtype("<u2")) as writer, staging_folder(folder / "corpus") as stage:
        writer.add(range(60_000))
        writer.add(range(60_000))
        for _ in range(20):
            writer.add(range(60_000))
        (stage / "file").write_text("half")
        if os.fork() == 0:  # a worker, which outlives a killed parent
            time.sleep(float(sys.argv[2]))
            os._exit(0)
        print("held", flush=True)
        time.sleep(600)
"""


@contextmanager
def holder(folder: Path, worker_seconds: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing a pair and a folder; killed at the end."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder), str(worker_seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_writers_of_one_name_are_refused_and_a_killed_one_leaves_the_name_free(tmp_path: Path) -> None:
    with holder(tmp_path, worker_seconds=20):
        with pytest.raises(DatasetError, match=r"another process is writing .*text\.bin right now; wait for it or choose another name"):
            write(tmp_path / "text", [[1]])
        with (
            pytest.raises(DatasetError, match=r"another process is preparing .*corpus right now; wait for it or choose another name"),
            staging_folder(tmp_path / "corpus"),
        ):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".corpus.partial", "text.bin.partial"]
    assert IndexedDataset(write(tmp_path / "text", [[1, 2]])).tokens.tolist() == [1, 2]
    with staging_folder(tmp_path / "corpus") as stage:
        assert [path.name for path in stage.iterdir()] == ["lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.bin", "text.idx"]


def test_a_file_published_between_opening_and_locking_is_not_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, moves = tmp_path / "text.partial", fcntl.lockf, []
    path.write_text("whole")

    def lockf(file: int, operation: int) -> None:
        if not moves:
            moves.append(os.rename(path, tmp_path / "text"))
        real(file, operation)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with open_locked(path) as file:
        file.write(b"new")
    assert (tmp_path / "text").read_text() == "whole"
    assert path.read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_written_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert IndexedDataset(write(tmp_path / "text", [[1, 2]])).tokens.tolist() == [1, 2]


def test_any_other_refusal_to_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(OSError, match="Input/output error"):
        open_locked(tmp_path / "text")


def fill(prefix: Path, size: int) -> None:
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for _ in range(1_200_000 // size):
            writer.add(np.zeros(size, np.uint16))


def test_a_full_disk_is_named_and_nothing_is_left(small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    folder = small_disk / "data"
    folder.mkdir()
    for size in (100_000, 450_000):  # full while the tokens are written, and when the last of them leave the buffer
        with pytest.raises(OSError) as raised:
            fill(folder / "text", size)
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(folder))
        assert not list(folder.iterdir())
    folder.rmdir()


def test_killed_while_it_writes_a_pair_the_old_pair_stays(tmp_path: Path) -> None:
    before = IndexedDataset(write(tmp_path / "text", [[7, 8, 9]])).tokens.tolist()
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert IndexedDataset(tmp_path / "text").tokens.tolist() == before
