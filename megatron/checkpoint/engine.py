"""How DeepSpeed writes and reads its files for us: its checkpoint engine interface, hashed, flushed to the disk, and never unpickling code."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.checkpoint import reading
from megatron.checkpoint.manifest import FileRecord, HashingWriter

CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class HashingCheckpointEngine(CheckpointEngine):
    """Records size and SHA-256 of each file this rank writes, and the first OSError instead of raising it.

    DeepSpeed has barriers between its files: a rank that raised there would leave the others waiting. Whoever saves asks `error` afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.files: dict[Path, FileRecord] = {}
        self.error: OSError | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """As os.makedirs, recording an OSError."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one file; tensors go from memory to the file without a copy and are hashed on the way."""
        if self.error is not None:
            return
        try:
            self.files[Path(path)] = write_tensors(state_dict, Path(path))
        except OSError as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one file onto the CPU. Not memory-mapped: PyTorch's optimizers keep the tensors they are given."""
        return reading.read_file(Path(path), mmap=False, classes=CLASSES)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """The manifest and `latest` are the commit; see save.py."""
        return True


def write_tensors(value: Any, path: Path) -> FileRecord:
    """`torch.save` that hashes while it writes and flushes to the disk. Raises the system's OSError."""
    writer = HashingWriter(path)
    try:
        torch.save(value, writer)  # type: ignore[arg-type]
    except Exception:
        writer.abandon()
        if writer.error is not None:  # PyTorch's C++ writer hides it behind a RuntimeError of its own
            raise writer.error from None
        raise
    return writer.close()


@contextmanager
def checkpoint_engine(engine: Any) -> Iterator[HashingCheckpointEngine]:
    """Puts our checkpoint engine into a DeepSpeed engine for the length of a save or load."""
    ours, theirs = HashingCheckpointEngine(), engine.checkpoint_engine
    engine.checkpoint_engine = ours
    try:
        yield ours
    finally:
        engine.checkpoint_engine = theirs


@contextmanager
def without_wildcards(directory: Path) -> Iterator[Path]:
    """The same directory under a name that DeepSpeed's `glob` takes literally: a path with [brackets] in it would match nothing."""
    if not glob.has_magic(str(directory)):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        link = Path(temporary) / "directory"
        link.symlink_to(directory.resolve(), target_is_directory=True)
        yield link
