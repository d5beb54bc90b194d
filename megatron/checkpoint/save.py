"""Writing a checkpoint so that a kill at any moment leaves either all of it or nothing.

Everything goes into <save>/.incomplete/; when every rank's files are on the disk, the manifest follows, one rename puts the directory in its place,
and `latest` is replaced. A directory called global_step<N> is therefore whole from the moment it exists.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron.checkpoint import layout, ranks
from megatron.checkpoint.engine import Contents, checkpoint_engine, write_tensors
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.held import Share, base_optimizer, held_optimizer, held_weights, optimizer_order, optimizer_slots
from megatron.checkpoint.manifest import FileRecord, sync_directory, write_bytes, write_manifest
from megatron.checkpoint.names import logical_name
from megatron.checkpoint.random_state import capture_random_state
from megatron.checkpoint.sums import OwnSums, described, own_sums
from megatron.checkpoint.table import Table, table_bytes
from megatron.config import disk
from megatron.data.folders import broken_link, remove_folder
from megatron.model.division import Cut
from megatron.mpu.topology import Topology


def save_checkpoint(
    engine: Any,
    directory: Path | str,
    iteration: int,
    *,
    client_state: Mapping[str, Any],
    documents: Mapping[str, str],
    contents: Contents | None = None,
) -> Path:
    """Saves a DeepSpeed engine (ZeRO 0 to 3) as <directory>/global_step<iteration> and returns that path. Collective: every rank calls it.

    `client_state`: plain values and tensors (dict, list, tuple, str, numbers, None), the same on every rank; `iteration` and NeoX's random states
    are added. `documents`: file name (without folders) -> text, for configs/. `contents` None: everything, the weights in one file.
    Raises CheckpointError on every rank when any rank could not write (disk full, no permission, ...); what was there stays as it is.
    """
    directory, contents = Path(directory), contents or Contents()
    share = contents.share or Share(Topology(ranks.world_size(), ranks.rank()))
    ranks.together(lambda: check_client_state(client_state))
    ranks.together(lambda: prepare(directory), only_rank=0)
    staged = layout.staging(directory) / layout.tag(iteration)
    random_state = capture_random_state() if contents.random_state else {}
    state = {"iteration": iteration, layout.GQA_LAYOUT_KEY: layout.GQA_LAYOUT, **client_state, **random_state}
    cuts = cuts_by_name(ranks.gather({held.name: held.cut for held in held_weights(engine, share)}))
    gathered = ranks.gather(_write_rank_files(engine, staged, state, contents, Owned(share, cuts)))
    facts = {**contents.facts, "iteration": iteration, "world_size": ranks.world_size(), "zero_stage": int(engine.zero_optimization_stage())}
    try:
        ranks.raise_first([(_explain(directory, iteration, rank.error) if rank.error else None, CheckpointError) for rank in gathered])
        facts[layout.TENSORS] = described([rank.sums for rank in gathered], share.topology)
        all_files = {name: record for rank in gathered for name, record in rank.files.items()}
        writers = {name: number for number, rank in enumerate(gathered) for name in rank.files}
        table = Table(share.topology, cuts, writers, {number: rank.order for number, rank in enumerate(gathered)})
        ranks.together(lambda: commit(directory, staged, all_files, documents, facts, table), only_rank=0)
    except CheckpointError as error:
        if ranks.rank() == 0:
            shutil.rmtree(layout.staging(directory), ignore_errors=True)
        message = str(error)
        raise CheckpointError(message if message.startswith("Could not save") else _explain(directory, iteration, message)) from error
    return directory / layout.tag(iteration)


class Owned(NamedTuple):
    """This process's share, and what every process holds of each weight."""

    share: Share
    cuts: Mapping[str, Mapping[int, Cut]]

    def alone(self) -> frozenset[str]:
        """The weights of which the file of the first data-parallel process, which DeepSpeed writes, has another part, while this process is the first
        of those that hold the same part: experts that data-parallel processes share."""
        topology = self.share.topology
        first = topology.rank_of(topology.place._replace(data=0))
        own, theirs = topology.rank, {name: by_rank.get(first) for name, by_rank in self.cuts.items()}
        return frozenset(
            name
            for name, by_rank in self.cuts.items()
            if own in by_rank and by_rank[own] != theirs[name] and min(rank for rank, cut in by_rank.items() if cut == by_rank[own]) == own
        )

    def of_this_stage(self, engine: Any) -> dict[str, Any]:
        """The weights without those that an earlier stage of the pipeline has as well, and writes."""
        topology = self.share.topology
        earlier = {topology.rank_of(topology.place._replace(pipe=pipe)) for pipe in range(topology.pipe_rank)}
        weights = engine.module.state_dict().items()
        return {name: tensor for name, tensor in weights if not earlier & set(self.cuts.get(logical_name(name), ()))}


class Written(NamedTuple):
    """What a process wrote, and what it says about that. `error`: why it could not."""

    files: dict[str, FileRecord]
    sums: OwnSums
    order: list[list[str]]
    error: str | None


def cuts_by_name(gathered: Sequence[Mapping[str, Cut]]) -> dict[str, dict[int, Cut]]:
    """Name -> process -> its part, from what each process holds."""
    cuts: dict[str, dict[int, Cut]] = {}
    for rank, own in enumerate(gathered):
        for name, cut in own.items():
            cuts.setdefault(name, {})[rank] = cut
    return cuts


def check_client_state(client_state: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a key that is DeepSpeed's, or a value that `weights_only` reading would refuse later."""
    for key, value in client_state.items():
        if key in layout.DEEPSPEED_KEYS:
            raise CheckpointError(f"client_state key {key!r} is used by DeepSpeed in the same file: choose another name.")
        _check_plain(value, f"client_state[{key!r}]")


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(key, f"{where} key")
            _check_plain(entry, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, bytes, type(None), torch.Tensor, torch.nn.Parameter):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}: only tensors, numbers, text, None, lists, tuples and dicts can be read back safely."
        )


def prepare(directory: Path) -> None:
    """Makes `directory` ready for a save: removes what killed runs left, and undoes a replacement that was cut in two. Raises CheckpointError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = layout.staging(directory)
        remove_folder(staging)
        for step in layout.iterations_in(directory):
            aside, path = layout.replaced(directory, step), directory / layout.tag(step)
            if os.path.lexists(aside) and path.exists():
                remove_folder(aside)
            elif aside.exists():
                os.replace(aside, path)
        staging.mkdir()
    except OSError as error:
        why = broken_link(directory) or disk.sentence(error, directory)
        raise CheckpointError(f"Could not save into {directory}: {why}. Nothing was changed. Check that you may write to the directory.") from error


def _write_rank_files(engine: Any, staged: Path, state: dict[str, Any], contents: Contents, owned: Owned) -> Written:
    rank = ranks.rank()
    contents = replace(contents, share=owned.share, stage=lambda: owned.of_this_stage(engine))
    with checkpoint_engine(engine, contents) as writer:
        engine.save_checkpoint(str(staged.parent), tag=staged.name, client_state=state, save_latest=False)
    files, error = {file.name: record for file, record in writer.files.items()}, writer.error
    own: dict[str, Any] = {}
    if rank > 0 and contents.random_state:
        own[layout.random_state_file(rank)] = {key: state[key] for key in capture_random_state()}
    if int(engine.zero_optimization_stage()) < 3 and (alone := owned.alone()):
        own[layout.part_file(rank)] = part_content(engine, owned.share, alone, optimizer=contents.optimizer)
    for name, content in own.items():
        if error is None:
            try:
                files[name] = write_tensors(content, staged / name)
            except OSError as failure:
                error = failure
    sums, order = OwnSums({}, {}), list[list[str]]()
    if error is None:
        sums = own_sums(engine, owned.share, optimizer=contents.optimizer, copies=False)
        order = optimizer_order(engine) if contents.optimizer else []
    return Written(files, sums, order, None if error is None else disk.explained(error, staged))


def part_content(engine: Any, share: Share, names: Collection[str], *, optimizer: bool) -> dict[str, Any]:
    """The weights of these names that this process holds, and without ZeRO (which has files of its own) their optimizer state by name."""
    module = {held.name: held.values.view(held.cut.local_shape).clone() for held in held_weights(engine, share) if held.name in names}
    if not optimizer or engine.zero_optimization_stage() or hasattr(engine.optimizer, "fp32_groups_flat_partition"):
        return {"module": module}
    slots = [slot for slot in optimizer_slots(engine, share) if slot.name in names]
    states: dict[str, dict[str, Any]] = {slot.name: {} for slot in slots}
    for kind, held in held_optimizer(engine, slots):
        states[held.name][kind] = held.values.view(held.cut.local_shape).clone()
    base = base_optimizer(engine)
    for slot in slots:
        steps = base.state.get(slot.flat, {}).get("step")
        if steps is not None:
            states[slot.name]["step"] = float(steps)
    return {"module": module, layout.STATES: states}


def commit(
    directory: Path, staged: Path, files: dict[str, FileRecord], documents: Mapping[str, str], facts: Mapping[str, Any], table: Table | None = None
) -> None:
    """Rank 0, when every rank's files are on the disk: documents, table of parts, manifest, rename, `latest`."""
    configs = staged / layout.CONFIGS
    configs.mkdir()
    for name, text in documents.items():
        files[f"{layout.CONFIGS}/{name}"] = write_bytes(configs / name, text.encode())
    sync_directory(configs)
    if table is not None:
        files[layout.DIVISION] = write_bytes(staged / layout.DIVISION, table_bytes(table))
    versions = {"torch": str(torch.__version__), "host": socket.gethostname(), "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_manifest(staged, files, {**facts, **versions})
    sync_directory(staged)
    latest = staged.parent / layout.LATEST
    write_bytes(latest, staged.name.encode())  # before the rename: from there on nothing needs room on the disk
    _put_in_place(directory, staged, facts["iteration"])
    os.replace(latest, directory / layout.LATEST)
    sync_directory(directory)
    shutil.rmtree(layout.staging(directory), ignore_errors=True)
    with suppress(OSError):
        remove_folder(layout.replaced(directory, facts["iteration"]))


def _put_in_place(directory: Path, staged: Path, iteration: int) -> None:
    """Renames a whole checkpoint to its place. An older one of the same step is moved aside first, where `layout.path_of` still finds it."""
    path, aside = directory / layout.tag(iteration), layout.replaced(directory, iteration)
    if os.path.lexists(path):  # a link, whatever it leads to, is moved as such
        remove_folder(aside)
        os.replace(path, aside)
    try:
        os.replace(staged, path)
    except OSError:
        if os.path.lexists(aside):
            os.replace(aside, path)
        raise
    sync_directory(directory)


def _explain(directory: Path, iteration: int, reason: str) -> str:
    return (
        f"Could not save {directory / layout.tag(iteration)}: {reason.rstrip('.')}. The incomplete files have been removed; "
        f"the earlier checkpoints and `{layout.LATEST}` have not changed. Free space, or set `save` to another directory, then start again."
    )


def resolved_config_document(flat: Mapping[str, Any]) -> dict[str, str]:
    """The entry of `documents` that load_model_weights reads back: every key of the resolved configuration."""
    return {layout.RESOLVED_CONFIG: json.dumps(flat, indent=1, sort_keys=True, default=str) + "\n"}
