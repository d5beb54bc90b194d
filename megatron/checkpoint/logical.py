"""A checkpoint of any layout as one list of whole weights, of which a process asks for its part, and for the part of their optimizer state.

Files are memory-mapped, and only what overlaps the part is read. `read` needs memory for the part, and for one process's tensor of the weight where
ZeRO has cut it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import layout
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.foreign_parts import ForeignParts, optimizer_orders
from megatron.checkpoint.held import MASTER, WEIGHT
from megatron.checkpoint.layerwise import LayerwiseWeights, layer_of
from megatron.checkpoint.names import is_derived, logical_name, one_name
from megatron.checkpoint.parts import copy_part, count_within, overlaps
from megatron.checkpoint.sources import (
    STATE,
    Files,
    Placed,
    Run,
    Source,
    Sources,
    add_flat,
    add_named,
    add_numbered,
    add_third_stage,
    is_third_stage,
    named_shapes,
)
from megatron.checkpoint.stored import StoredCheckpoint, inspect_checkpoint
from megatron.checkpoint.table import Table, read_table
from megatron.checkpoint.vocabulary import check_padding
from megatron.checkpoint.weights import Expected
from megatron.model.division import Cut, whole_cut

Shape = tuple[int, ...]
SHARED = "sequential.{}.attention.rpe.weight"
UNREADABLE = (KeyError, IndexError, TypeError, AttributeError, ValueError)


class LogicalCheckpoint:
    """The checkpoint at `path`. `expected` as loading knows the model. Raises CheckpointError, here and in `read`.

    `shapes`: every weight that it holds, by today's name. `head`: the first model file without its weights. `notices`: sentences for the user.
    """

    def __init__(self, path: Path, expected: Expected | None = None, *, optimizer: bool = True) -> None:
        self.path, self.expected, self.files = path, expected or Expected(), Files()
        self.sources, self.notices = Sources(), list[str]()
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._weights: LayerwiseWeights | None = None
        self._parts: ForeignParts | None = None
        self.table = read_table(path)
        try:
            divided = self.table is not None and self.table.is_divided
            self.head = self._open_divided(self.table) if divided and self.table is not None else self._open_whole()
            if optimizer or (divided and layout.matching_files(path, layout.ZERO3_MODEL_FILE_PATTERN)):
                self._add_optimizer()
        except UNREADABLE as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: its files are not in a form that this program knows ({type(error).__name__}: {error}).") from error

    @property
    def has_optimizer(self) -> bool:
        """Whether it holds the state of an optimizer."""
        return any(kind not in (WEIGHT, MASTER) for kinds in self.sources.by_name.values() for kind in kinds)

    @property
    def is_bf16_form(self) -> bool:
        """Whether DeepSpeed's BF16 optimizer wrote the optimizer files, which differ from those of ZeRO 1 and 2 in a few entries."""
        files = layout.matching_files(self.path, layout.OPTIMIZER_FILE_PATTERN)
        return bool(files) and "zero_stage" not in self.files.at(files[0], (STATE,))

    def every_name(self) -> list[str]:
        """The names of all weights, also the second ones of a weight that layers share."""
        names = list(self.shapes)
        if SHARED.format(2) in names:
            names += [table for name in names if name.endswith(".attention.dense.weight") and (table := SHARED.format(layer_of(name))) not in names]
        return names

    def kinds(self, name: str) -> list[str]:
        """What there is of the optimizer's state of a weight: `exp_avg`, ..."""
        return [kind for kind in self.sources.by_name.get(name, {}) if kind not in (WEIGHT, MASTER)]

    def has(self, name: str, kind: str) -> bool:
        """Whether `read` can give this kind of tensor."""
        return kind in self.sources.by_name.get(name, {}) or (kind == WEIGHT and name in self.shapes)

    def whole(self, name: str) -> Cut:
        """All of a weight."""
        return whole_cut(self.shapes[name])

    def read(self, name: str, kind: str, cut: Cut) -> Tensor:
        """The part `cut` of a weight (kind `weight`), its float32 copy (`master`) or its state; a new tensor, or one that lies in a file.

        Where `cut` has more rows than the checkpoint, they are rows that fill up the vocabulary, and 0.
        """
        parts = self.sources.by_name.get(name, {}).get(kind)
        if parts is None and kind == WEIGHT and self._weights is not None:
            whole = self._weights.read(name)
            return whole if cut.is_whole and cut.shape == tuple(whole.shape) else self._filled(name, kind, cut, [(whole, whole_cut(whole.shape))])
        if parts is None and kind == WEIGHT:
            return self.read(name, MASTER, cut).to(self.dtypes[name])
        if parts is None:
            raise CheckpointError(f"{self.path} holds no {kind} of {name}.")
        if self._parts is not None and self._parts.is_copied(name) and len(parts) > 1:
            whole = self._joined_copies(name, kind, parts)
            return self._filled(name, kind, cut, [(whole, whole_cut(whole.shape))])
        if len(parts) == 1 and parts[0].cut.is_whole and cut.is_whole and parts[0].cut.shape == cut.shape:
            return self.files.read(parts[0])
        return self._filled(name, kind, cut, [(None, part) for part in parts])

    def close(self) -> None:
        """Gives back the memory of what was read; `read` opens the files again."""
        self.files.close()
        if self._weights is not None:
            self._weights.close()

    def _filled(self, name: str, kind: str, cut: Cut, parts: Sequence[tuple[Tensor | None, Cut | Source]]) -> Tensor:
        target: Tensor | None = None
        copied, shape = 0, cut.shape
        for tensor, part in parts:
            held = part.cut if isinstance(part, Source) else part
            if next(overlaps(cut, held), None) is None:
                continue
            source = self.files.read(part) if isinstance(part, Source) else tensor
            assert source is not None
            target = torch.zeros(cut.local_shape, dtype=source.dtype) if target is None else target
            copied, shape = copied + copy_part(target, cut, source, held), held.shape
        if copied != count_within(cut, shape) or target is None:
            raise CheckpointError(f"{self.path} does not hold all of {name} ({kind}): parts of it are missing.")
        return target

    def _joined_copies(self, name: str, kind: str, parts: Sequence[Source]) -> Tensor:
        """One tensor from the copies of all tensor-parallel processes: their sum or their mean (`shards.merge_shards`)."""
        copies = [self.files.read(part) for part in parts]
        assert self._parts is not None
        if self._parts.is_added(name) and self.expected.parallel_residual and kind == MASTER:
            return torch.stack([copy.float() for copy in copies]).sum(0)
        if all(torch.equal(copy, copies[0]) for copy in copies[1:]):
            return copies[0]
        return torch.stack([copy.float() for copy in copies]).mean(0).to(copies[0].dtype)

    def check_vocabulary(self, shapes: Mapping[str, Shape]) -> str | None:
        """A sentence where the model (`shapes`) has another number of rows for the vocabulary; None where not. Raises CheckpointError for another
        tokenizer."""
        return check_padding(self.shapes, shapes, vocab_size=self.expected.vocab_size, args=self.head.get("args") or {})

    def _open_whole(self) -> dict[str, Any]:
        """Weights that are not divided, or are as GPT-NeoX divides them."""
        self._stored = stored = inspect_checkpoint(self.path)
        if stored.is_zero3 and stored.is_own:
            self._add_third_stage_weights(stored)
        else:
            self._weights = LayerwiseWeights(self.path, self.expected)
            self.notices += self._weights.notices
        args = stored.client_state.get("args") or {}
        heads, count = args.get("num_attention_heads") or self.expected.args.get("num_attention_heads") or 1, len(stored.shards)
        if self._weights is not None and (not stored.is_own or count > 1):
            self._parts = ForeignParts(stored.shapes, count, heads=max(1, heads // count), per_head=self._weights.layout == "per_head")
            self.sources.keeps_copies = self._parts.is_copied
        for name, shape in stored.shapes.items():
            if (placed := self._placed_for(0)(name, shape)) is not None:
                self.shapes[placed[0]], self.dtypes[placed[0]] = placed[1].shape, stored.shards[0][name].dtype
        return {**stored.head, **stored.client_state}

    def _open_divided(self, table: Table) -> dict[str, Any]:
        """Weights that this program divided: each file's are the parts of the process that wrote it."""
        for file in _model_files(self.path):
            for keys, weights in _weights_in(self.files, file):
                for stored_name, tensor in weights.items():
                    name = one_name(logical_name(f"{_prefix(file)}{stored_name}"))
                    if name in table.cuts and isinstance(tensor, Tensor) and tensor.numel():
                        cut = table.cuts[name][table.writers[file.name]]
                        self.sources.add(name, WEIGHT, Source(cut, (Run(file, (*keys, stored_name), 0, tensor.numel()),)))
                    if isinstance(tensor, Tensor):
                        self.dtypes.setdefault(name, tensor.dtype)
        self.shapes = {name: next(iter(cuts.values())).shape for name, cuts in table.cuts.items()}
        head = self.files.content(self._head_file())
        return {key: value for key, value in head.items() if key != "module"}

    def _head_file(self) -> Path:
        files = [*layout.matching_files(self.path, layout.MODEL_FILE_PATTERN), *layout.matching_files(self.path, layout.ZERO3_MODEL_FILE_PATTERN)]
        if not files:
            raise CheckpointError(f"{self.path} is incomplete: {layout.model_file(0)} is missing.")
        return files[0]

    def _add_third_stage_weights(self, stored: StoredCheckpoint) -> None:
        """Weights of ZeRO 3 are the optimizer's copies, in the format that they are used in; buffers, weights that are not trained and second names
        for the same weight lie in the model files."""
        model_files = layout.matching_files(self.path, layout.ZERO3_MODEL_FILE_PATTERN)
        for name in stored.head["buffer_names"]:
            if name in stored.shards[0]:
                tensor = stored.shards[0][name]
                self.sources.add(name, WEIGHT, Source(whole_cut(tensor.shape), (Run(model_files[0], ("module", name), 0, tensor.numel()),)))
        for name, shape in (stored.head.get("frozen_param_shapes") or {}).items():
            left, runs = torch.Size(shape).numel(), []
            for file in model_files:
                keys = ("frozen_param_fragments", name)
                count = min(left, self.files.at(file, keys).numel())
                runs.append(Run(file, keys, 0, count))
                left -= count
            self.sources.add(name, WEIGHT, Source(whole_cut(tuple(shape)), tuple(run for run in runs if run.length)))
        self._add_third_stage_team(stored)
        for name, source in (stored.head.get("shared_params") or {}).items():
            self.sources.by_name[name] = {WEIGHT: self.sources.by_name[source][MASTER]}

    def _add_third_stage_team(self, stored: StoredCheckpoint) -> None:
        files = stored.optimizer_files
        if len(files) != stored.world_size:
            raise CheckpointError(
                f"{self.path} was saved by {stored.world_size} processes but holds {len(files)} *_optim_states.pt files: some are missing."
            )
        self._add_zero(files, stored.head["param_shapes"], self._placed_for(0))

    def _undivided(self, stored_name: str, shape: Shape) -> tuple[str, Cut] | None:
        name = one_name(logical_name(stored_name))
        return None if is_derived(name) else (name, whole_cut(shape))

    def _add_optimizer(self) -> None:
        layers = layout.matching_files(self.path, layout.LAYER_OPTIMIZER_FILE_PATTERN)
        if layers:
            for file in layers:
                add_named(self.sources, self.files, file, (), self._undivided)
        elif self.table is not None and self.table.is_divided:
            self._add_divided_optimizer(self.table)
        elif files := layout.matching_files(self.path, layout.OPTIMIZER_FILE_PATTERN):
            if not self._stored.is_zero3:
                self._add_zero_teams(files)
            elif self._weights is not None:
                self._add_third_stage_team(self._stored)
        elif self.head.get("optimizer"):
            self._add_numbered_whole()

    def _add_numbered_whole(self) -> None:
        heads = layout.matching_files(self.path, layout.MODEL_FILE_PATTERN)
        count = 1 if self._parts is None else self._parts.count
        if len(heads) > count:
            raise CheckpointError(
                f"{self.path} was saved by {len(heads)} processes that divided the model, without ZeRO. Such an optimizer state does not say which "
                "weights it belongs to, so it cannot be read: add `-o no_load_optim=true` to continue from the weights with a new optimizer state."
            )
        shapes = {one_name(logical_name(name)): shape for name, shape in self._stored.shapes.items()}
        if self.table is not None and 0 in self.table.orders:
            orders = [{name: shapes[name] for name in order} for order in self.table.orders[0]]
        else:
            orders = optimizer_orders(shapes, self.head.get("buffer_names") or ())
        for process, file in enumerate(heads):
            add_numbered(self.sources, self.files, file, orders, self._placed_for(process))

    def _add_zero_teams(self, files: Sequence[Path]) -> None:
        """ZeRO files of an undivided model, or of GPT-NeoX's tensor and pipeline parallelism: `mp_rank` counts stages first, then tensor parts."""
        count = 1 if self._parts is None else self._parts.count
        teams: dict[int, list[Path]] = {}
        for file in files:
            match = layout.OPTIMIZER_FILE_PATTERN.fullmatch(file.name)
            assert match is not None
            teams.setdefault(int(match[2]), []).append(file)
        for process, team in sorted(teams.items()):
            head = self.files.content(self.path / layout.model_file(process))
            expected = head.get("dp_world_size") or len(team)
            if len(team) != expected:
                raise CheckpointError(
                    f"{self.path} was saved by {expected} data-parallel processes but holds {len(team)} *_mp_rank_{process:02d}_optim_states.pt."
                )
            self._add_zero(team, head.get("param_shapes"), self._placed_for(process % count))

    def _add_zero(self, team: Sequence[Path], shapes: Any, placed: Placed) -> None:
        if not shapes or not any(shapes):
            raise CheckpointError(f"{team[0].parent}: its model file does not say in which order the optimizer's weights lie (`param_shapes`).")
        add = add_third_stage if is_third_stage(self.files.at(team[0], (STATE,))) else add_flat
        add(self.sources, self.files, team, shapes, placed)

    def _placed_for(self, process: int) -> Placed:
        parts = self._parts
        return self._undivided if parts is None else lambda name, shape: parts.part(name, shape, process)

    def _add_divided_optimizer(self, table: Table) -> None:
        optimizer_files = {
            table.writers[file.name]: file for file in layout.matching_files(self.path, layout.OPTIMIZER_FILE_PATTERN) if file.name in table.writers
        }
        if not optimizer_files:
            for file in _model_files(self.path):
                writer = table.writers[file.name]
                if writer in table.orders and layout.MODEL_FILE_PATTERN.fullmatch(file.name) and self.files.content(file).get("optimizer"):
                    orders = [{name: table.cuts[name][writer].local_shape for name in order} for order in table.orders[writer]]
                    add_numbered(self.sources, self.files, file, orders, self._of(table, writer))
                if layout.STATES in self.files.content(file):
                    add_named(self.sources, self.files, file, (layout.STATES,), self._of(table, writer))
            return
        for file in (*layout.matching_files(self.path, layout.MODEL_FILE_PATTERN), *_third_stage_heads(self.path)):
            shapes, place = named_shapes(self.files.content(file)["param_shapes"]), table.place(table.writers[file.name])
            processes = [rank for rank in optimizer_files if table.place(rank)[::2] == place[::2]]
            for cuts in _alike(shapes, table, processes):
                team = [optimizer_files[rank] for rank in cuts]
                self._add_zero(team, shapes, self._of(table, cuts[0], team=set(cuts), among=processes))

    @staticmethod
    def _of(table: Table, process: int, team: set[int] | None = None, among: Sequence[int] = ()) -> Placed:
        """The parts of a process; with `team` only those that exactly this team of `among` holds."""

        def placed(stored_name: str, shape: Shape) -> tuple[str, Cut] | None:
            name = one_name(logical_name(stored_name))
            cut = table.cuts[name][process]
            return (name, cut) if team is None or team == {rank for rank in among if table.cuts[name].get(rank) == cut} else None

        return placed


def _alike(shapes: Sequence[Mapping[str, Shape]], table: Table, processes: Sequence[int]) -> list[list[int]]:
    """The teams of processes that hold the same part of some weight, among these."""
    teams: dict[tuple[int, ...], None] = {}
    for group in shapes:
        for name in group:
            by_cut: dict[Cut, list[int]] = {}
            for rank in processes:
                by_cut.setdefault(table.cuts[name][rank], []).append(rank)
            teams |= dict.fromkeys(map(tuple, by_cut.values()))
    return [list(team) for team in teams]


def _model_files(path: Path) -> list[Path]:
    patterns = (layout.MODEL_FILE_PATTERN, layout.LAYER_FILE_PATTERN, layout.PART_FILE_PATTERN, layout.ZERO3_MODEL_FILE_PATTERN)
    return [file for pattern in patterns for file in layout.matching_files(path, pattern)]


def _third_stage_heads(path: Path) -> list[Path]:
    return [file for file in layout.matching_files(path, layout.ZERO3_MODEL_FILE_PATTERN) if file.name.startswith("zero_pp_rank_0_")]


def _prefix(file: Path) -> str:
    match = layout.LAYER_FILE_PATTERN.fullmatch(file.name)
    return "" if match is None else f"sequential.{int(match[1])}."


def _weights_in(files: Files, file: Path) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    content = files.content(file)
    if layout.LAYER_FILE_PATTERN.fullmatch(file.name):
        return [((), content)]
    return [(("module",), content["module"])] if isinstance(content.get("module"), dict) else []
