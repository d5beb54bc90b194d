"""Where a checkpoint's files hold the parts of a weight, of its float32 copy and of its optimizer state.

DeepSpeed's forms, as its files show them (0.10 to 0.19):

    ZeRO 0      `optimizer` in the model file: PyTorch's state by number, in the order of the optimizer's groups; with 16-bit weights in a wrapper,
                which has the float32 copies one by one (`fp32_groups`) or one after the other (`fp32_groups_flat`)
    ZeRO 1, 2   the weights of a group lie one after the other, in the order of `param_shapes`; data-parallel process r has the r-th of equally long
                parts. DeepSpeed's BF16 optimizer does the same at every stage.
    ZeRO 3      each weight of n elements is cut into W parts of ceil(n / W); process r has its parts one after the other, in that order
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.held import MASTER
from megatron.checkpoint.names import logical_name, one_name
from megatron.checkpoint.reading import read_file
from megatron.model.division import Cut

Keys = tuple[str | int, ...]
STATE = "optimizer_state_dict"
ADVICE = "Add `-o no_load_optim=true` to continue from the weights with a new optimizer state."
Placed = Callable[[str, tuple[int, ...]], tuple[str, Cut] | None]
"""Name and shape of a process's tensor -> the weight that it belongs to, and its part of that. None: it belongs to none."""


class Run(NamedTuple):
    """Elements that lie one after the other in a file: `length` of them from `begin` on, of the tensor that `keys` lead to."""

    file: Path
    keys: Keys
    begin: int
    length: int


class Source(NamedTuple):
    """A process's tensor of a weight: the part `cut`, in runs one after the other."""

    cut: Cut
    runs: tuple[Run, ...]


class Files:
    """Opened files of a checkpoint, memory-mapped. `close` gives their memory back."""

    def __init__(self) -> None:
        self._contents: dict[Path, Any] = {}

    def content(self, file: Path) -> Any:
        """What a file holds. Raises CheckpointError."""
        if file not in self._contents:
            self._contents[file] = read_file(file, mmap=True)
        return self._contents[file]

    def at(self, file: Path, keys: Keys) -> Any:
        """The entry that `keys` lead to."""
        value = self.content(file)
        for key in keys:
            value = value[key]
        return value

    def read(self, source: Source) -> Tensor:
        """The process's tensor, read when it is used. Raises CheckpointError when the file holds fewer elements than it should."""
        parts = []
        for run in source.runs:
            tensor = self.at(run.file, run.keys).detach().reshape(-1)
            if tensor.numel() < run.begin + run.length:
                where = " / ".join(map(str, run.keys))
                raise CheckpointError(f"{run.file}: {where} has {tensor.numel():,} elements, but {run.begin + run.length:,} are needed.")
            parts.append(tensor[run.begin : run.begin + run.length])
        shape = source.cut.local_shape
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape) if parts else torch.empty(shape)

    def close(self) -> None:
        """Forgets everything that was opened."""
        self._contents.clear()


@dataclass
class Sources:
    """`by_name[name][kind]`: the parts of a tensor, each once, but for weights of which all copies are kept. `steps[name]`: how many steps the
    optimizer counted for a weight."""

    by_name: dict[str, dict[str, list[Source]]] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    keeps_copies: Callable[[str], bool] = lambda name: False

    def add(self, name: str, kind: str, source: Source) -> None:
        """Adds a part, unless another process holds the same."""
        parts = self.by_name.setdefault(name, {}).setdefault(kind, [])
        if self.keeps_copies(name) or all(part.cut != source.cut for part in parts):
            parts.append(source)


def add_numbered(sources: Sources, files: Files, file: Path, orders: Sequence[Mapping[str, Any]], placed: Placed) -> None:
    """The optimizer's state in a model file. `orders`: names and shapes of the weights in its groups. Raises CheckpointError when they do not fit."""
    optimizer: Mapping[str, Any] = files.at(file, ("optimizer",))
    inner: Mapping[str, Any] = optimizer.get(STATE, optimizer)
    keys: Keys = ("optimizer", STATE) if STATE in optimizer else ("optimizer",)
    groups, state = inner["param_groups"], inner["state"]
    in_one = "fp32_groups_flat" in optimizer
    if [len(group["params"]) for group in groups] != [1 if in_one else len(order) for order in orders]:
        raise CheckpointError(f"{file}: its optimizer has {len(groups)} groups of weights, which are not those of this model. {ADVICE}")
    for number, (group, order) in enumerate(zip(groups, orders, strict=True)):
        offset = 0
        for place, (name, shape) in enumerate(order.items()):
            index, count = group["params"][0 if in_one else place], math.prod(shape)
            entry: Mapping[str, Any] = state.get(index, {})
            found = {kind: (*keys, "state", index, kind) for kind in entry if is_elementwise(entry[kind])}
            if in_one or "fp32_groups" in optimizer:
                found[MASTER] = ("optimizer", "fp32_groups_flat", number) if in_one else ("optimizer", "fp32_groups", number, place)
            if (target := placed(name, tuple(shape))) is not None:
                for kind, where in found.items():
                    if not in_one and tuple(files.at(file, where).shape) != tuple(shape):
                        found_shape = list(files.at(file, where).shape)
                        raise CheckpointError(f"{file}: {kind} of {name} has shape {found_shape}, but the weight has {list(shape)}. {ADVICE}")
                    sources.add(target[0], kind, Source(target[1], (Run(file, where, offset, count),)))
                sources.steps.setdefault(target[0], _steps(entry, group))
            offset += count if in_one else 0


def add_flat(sources: Sources, files: Files, team: Sequence[Path], shapes: Sequence[Mapping[str, Any]], placed: Placed) -> None:
    """ZeRO 1 and 2. `team`: the files of the processes that share the weights, in order. `shapes`: `param_shapes`."""
    first = files.at(team[0], (STATE,))
    for number, group in enumerate(shapes):
        lengths = [files.at(file, (STATE, "single_partition_of_fp32_groups", number)).numel() for file in team]
        padding = (first.get("param_alignment_paddings") or {number: [0] * len(group)})[number]
        kinds = {MASTER: (STATE, "single_partition_of_fp32_groups", number), **_state_keys(first, number)}
        offset = 0
        for (stored_name, shape), behind in zip(group.items(), padding, strict=True):
            count, target = math.prod(shape), placed(stored_name, tuple(shape))
            if target is not None:
                for kind, keys in kinds.items():
                    runs = tuple(Run(team[rank], keys, begin, length) for rank, begin, length in _pieces(offset, count, lengths))
                    if sum(run.length for run in runs) != count:
                        raise CheckpointError(f"{team[0].parent}: the optimizer files hold too few elements for {stored_name}.")
                    sources.add(target[0], kind, Source(target[1], runs))
                sources.steps.setdefault(target[0], _flat_steps(first, number))
            offset += count + behind


def add_third_stage(sources: Sources, files: Files, team: Sequence[Path], shapes: Sequence[Mapping[str, Any]], placed: Placed) -> None:
    """ZeRO 3. `team` and `shapes` as `add_flat` has them."""
    first = files.at(team[0], (STATE,))
    for number, group in enumerate(shapes):
        kinds: dict[str, Keys] = {MASTER: (STATE, "fp32_flat_groups", number)}
        entry = first[STATE]["state"].get(number, {})
        kinds |= {kind: (STATE, STATE, "state", number, kind) for kind in entry if is_elementwise(entry[kind])}
        offset = 0
        for stored_name, shape in group.items():
            count = math.prod(shape)
            length = math.ceil(count / len(team))
            target = placed(stored_name, tuple(shape))
            if target is not None:
                for kind, keys in kinds.items():
                    counts = [max(0, min(length, count - rank * length)) for rank in range(len(team))]
                    runs = tuple(Run(file, keys, offset, part) for file, part in zip(team, counts, strict=True) if part)
                    sources.add(target[0], kind, Source(target[1], runs))
                sources.steps.setdefault(target[0], _steps(entry, {}))
            offset += length


def add_named(sources: Sources, files: Files, file: Path, keys: Keys, placed: Placed) -> None:
    """The optimizer's state by name, as this program writes it where DeepSpeed does not."""
    for name, entry in files.at(file, keys).items():
        for kind, value in entry.items():
            if not is_elementwise(value):
                sources.steps.setdefault(name, float(value))
            elif (target := placed(name, tuple(value.shape))) is not None:
                sources.add(target[0], kind, Source(target[1], (Run(file, (*keys, name, kind), 0, value.numel()),)))


def is_elementwise(value: Any) -> bool:
    """Whether an entry of the optimizer's state is for every element; a count of steps is not."""
    return isinstance(value, Tensor) and value.dim() > 0


def is_third_stage(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer file is ZeRO 3's."""
    return "fp32_flat_groups" in state


def _state_keys(state: Mapping[str, Any], number: int) -> dict[str, Keys]:
    """Where each kind of a group's state lies: by number in PyTorch's form, or in a list (`elastic_checkpoint`)."""
    base = state["base_optimizer_state"]
    keys: Keys = (STATE, "base_optimizer_state", *(("state",) if isinstance(base, dict) else ()), number)
    entry: Mapping[str, Any] = base["state"].get(number, {}) if isinstance(base, dict) else base[number]
    return {kind: (*keys, kind) for kind in entry if is_elementwise(entry[kind])}


def _flat_steps(state: Mapping[str, Any], number: int) -> float:
    base = state["base_optimizer_state"]
    if not isinstance(base, dict):
        return _steps(base[number], {"step": state.get("base_optimizer_state_step", 0)})
    return _steps(base["state"].get(number, {}), base["param_groups"][number])


def _steps(entry: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    value = entry.get("step", group.get("step", 0))
    return float(value or 0)


def _pieces(offset: int, count: int, lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(part, where it begins inside the part, length) of `count` elements from `offset` on, in parts of these lengths one after the other."""
    begin = 0
    for number, length in enumerate(lengths):
        first, last = max(offset, begin), min(offset + count, begin + length)
        if first < last:
            yield number, first - begin, last - first
        begin += length


def named_shapes(shapes: Sequence[Mapping[str, Any]]) -> list[dict[str, tuple[int, ...]]]:
    """`param_shapes` under the names that checkpoints use."""
    return [{one_name(logical_name(name)): tuple(shape) for name, shape in group.items()} for group in shapes]
