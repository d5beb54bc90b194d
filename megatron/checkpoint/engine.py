"""How DeepSpeed writes and reads its files for us: its checkpoint engine interface, hashed, flushed to the disk, and never unpickling code."""

from __future__ import annotations

import glob
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.checkpoint import layout, reading
from megatron.checkpoint.held import Share
from megatron.checkpoint.manifest import FileRecord, HashingWriter

CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, and how."""

    random_state: bool = True
    """Whether the random states are saved."""
    optimizer: bool = True
    """Whether the optimizer's state is saved; ZeRO 3's weights are part of it."""
    layer_files: bool = False
    """The weights lie in a file for each layer, as GPT-NeoX's pipeline writes them; ZeRO 3 has its own files for them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the manifest."""
    share: Share | None = None
    """What this process holds of the model. None: all of it; processes are data-parallel."""
    stage: Callable[[], Mapping[str, Any]] | None = None
    """The weights of a pipeline stage, which DeepSpeed does not hand over. None: it does."""


class HashingCheckpointEngine(CheckpointEngine):
    """`contents`: what is written of what DeepSpeed hands over. `change`: applied to the content of the model file that is read.

    Records size and SHA-256 of each file this rank writes, and the first OSError instead of raising it.

    DeepSpeed has barriers between its files: a rank that raised there would leave the others waiting. Whoever saves asks `error` afterwards.
    """

    def __init__(self, contents: Contents, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.contents, self.change = contents, change
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
        """Writes one of DeepSpeed's files, or several in its place; tensors go from memory to the file without a copy and are hashed on the way."""
        for name, content in arranged(Path(path).name, state_dict, self.contents):
            if self.error is not None:
                return
            file = Path(path).with_name(name)
            try:
                self.files[file] = write_tensors(content, file)
            except OSError as error:
                self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one file onto the CPU. Not memory-mapped: PyTorch's optimizers keep the tensors they are given."""
        content = reading.read_file(Path(path), mmap=False, classes=CLASSES)
        return self.change(content) if layout.MODEL_FILE_PATTERN.fullmatch(Path(path).name) else content

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


def arranged(name: str, content: Mapping[str, Any], contents: Contents) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The files, by name, that are written for the one that DeepSpeed would write. Layers come one by one, each a copy of its weights."""
    if layout.OPTIMIZER_FILE_PATTERN.fullmatch(name) and not contents.optimizer:
        return
    match = layout.MODEL_FILE_PATTERN.fullmatch(name)
    if match is None:
        yield name, content
        return
    head = {**content, "optimizer": content["optimizer"] if contents.optimizer else None}
    if content["module"] is None and contents.stage is not None:
        content = {**content, "module": contents.stage()}
        head["module"] = content["module"]
    if contents.layer_files:
        by_layer: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for stored_name in content["module"]:
            place = layout.PARAMETER_PATTERN.fullmatch(stored_name)
            assert place is not None, stored_name
            by_layer[int(place[1])].append((place[2], stored_name))
        for layer, names in by_layer.items():
            # Under ZeRO the weights are views of one long tensor, which would be written whole with each of them.
            process = int(match[1]) if contents.share is None else contents.share.topology.tensor_rank
            yield layout.layer_file(layer, process), {short: content["module"][long].detach().clone() for short, long in names}
        head["module"] = None
    yield name, head


@contextmanager
def checkpoint_engine(
    engine: Any, contents: Contents | None = None, change: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Iterator[HashingCheckpointEngine]:
    """Puts our checkpoint engine into a DeepSpeed engine for the length of a save or load. `change` None: model files are taken as they are."""
    ours, theirs = HashingCheckpointEngine(contents or Contents(), change or dict), engine.checkpoint_engine
    engine.checkpoint_engine = ours
    with _without_expert_files(type(engine)):
        try:
            yield ours
        finally:
            engine.checkpoint_engine = theirs


@contextmanager
def _without_expert_files(kind: Any) -> Iterator[None]:
    """Inside, an engine with experts that processes share (a property of ours, see training/engine.py) writes the files of any other: those that
    DeepSpeed has for experts are for its own layers alone."""
    name = "has_moe_layers"
    own = kind.__dict__.get(name)
    if not isinstance(getattr(kind, name, None), property):
        yield
        return
    setattr(kind, name, False)
    try:
        yield
    finally:
        delattr(kind, name)
        if own is not None:
            setattr(kind, name, own)


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
