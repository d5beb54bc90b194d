"""What a checkpoint of ours or a directory of Hugging Face's holds, and where two of them differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint import layout
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layerwise import LayerwiseWeights
from megatron.checkpoint.manifest import damage, read_manifest
from megatron.checkpoint.stored import inspect_checkpoint
from megatron.checkpoint.weights import Expected
from megatron.convert.errors import ConversionError
from megatron.convert.tensor_files import StoredTensors


class Held(NamedTuple):
    """Weights by their names, read when asked for, and lines on what they lie in."""

    path: Path
    names: list[str]
    read: Callable[[str], Tensor]
    facts: list[str]


class Weight(NamedTuple):
    """What a line of the listing says."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def open_any(path: Path) -> Held:
    """A checkpoint, the directory of a run (its latest checkpoint), or a directory of Hugging Face's. Raises CheckpointError, ConversionError."""
    if not path.is_dir():
        raise ConversionError(
            f"{path} is not a directory: give a checkpoint (global_step100), the directory of a run, or the directory of a Hugging Face model."
        )
    if (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        stored = StoredTensors(path)
        return Held(path, stored.names, stored.read, [f"a Hugging Face model in {_count(path, '*.safetensors')} files of weights"])
    checkpoint = path if layout.looks_like_checkpoint(path) else find_checkpoint(path)
    weights = LayerwiseWeights(checkpoint, Expected())
    return Held(checkpoint, weights.names, weights.read, [*_facts(checkpoint), *weights.notices])


def listing(held: Held) -> Iterator[Weight]:
    """Every weight, in the order of the file."""
    for name in held.names:
        tensor = held.read(name)
        yield Weight(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes)


def differences(first: Held, second: Held) -> Iterator[str]:
    """A sentence for every weight that only one has, or that is not the same in both."""
    other = set(second.names)
    for name in first.names:
        if name not in other:
            yield f"{name}: only in {first.path}"
        elif sentence := _difference(first.read(name), second.read(name)):
            yield f"{name}: {sentence}"
    own = set(first.names)
    yield from (f"{name}: only in {second.path}" for name in second.names if name not in own)


def _difference(a: Tensor, b: Tensor) -> str | None:
    """None: they are the same, bit for bit."""
    if a.shape != b.shape:
        return f"shape {list(a.shape)} and {list(b.shape)}"
    kinds = "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}, ".replace("torch.", "")
    if not kinds and torch.equal(a, b):
        return None
    apart = (a.double() - b.double()).abs()
    changed = int((apart != 0).sum())
    values = f"{changed:,} of {a.numel():,} numbers differ, by at most {float(apart.max()):.3g}" if changed else "the numbers are equal"
    return kinds + values


def _facts(path: Path) -> list[str]:
    stored = inspect_checkpoint(path)
    state = stored.client_state
    kind = "ZeRO 3's files" if stored.is_zero3 else "a file for each layer" if stored.is_layered else "one file for each process"
    optimizer = "with its optimizer" if stored.has_optimizer else "without an optimizer"
    facts = [f"iteration {state.get('iteration', 'unknown')}, {kind}, tensor-parallel {len(stored.shards)}, {optimizer}"]
    manifest = read_manifest(path)
    if manifest is None:
        return [*facts, "no manifest, so its files cannot be checked"]
    problems = damage(path)
    return [*facts, *(problems or [f"{len(manifest.files)} files, all undamaged (size and SHA-256 checked)"])]


def _count(path: Path, pattern: str) -> int:
    return len(list(path.glob(pattern))) or len(list(path.glob("*.bin")))
