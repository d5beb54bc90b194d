"""Checkpoints made without an engine: small files with a true manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import layout
from megatron.checkpoint.manifest import FileRecord, write_bytes, write_manifest

MODEL_FILE = "mp_rank_00_model_states.pt"


def make_checkpoint(directory: Path, iteration: int, *, model: dict[str, Any] | None = None, manifest: bool = True, latest: bool = True) -> Path:
    """Writes <directory>/global_step<iteration> with one model file and one document."""
    path = directory / layout.tag(iteration)
    (path / layout.CONFIGS).mkdir(parents=True)
    torch.save(model or {"module": {"weight": torch.full((4,), float(iteration))}, "iteration": iteration, "dp_world_size": 1}, path / MODEL_FILE)
    records = {MODEL_FILE: record(path / MODEL_FILE), "configs/a.yml": write_bytes(path / "configs/a.yml", b"x: 1\n")}
    if manifest:
        write_manifest(path, records, {"iteration": iteration})
    if latest:
        (directory / layout.LATEST).write_text(layout.tag(iteration))
    return path


def record(file: Path) -> FileRecord:
    """The true record of a file that was written by other means."""
    return write_bytes(file, file.read_bytes())
