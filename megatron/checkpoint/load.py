"""Putting a checkpoint into a DeepSpeed engine: everything is compared first, so that an engine is either loaded or untouched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.checkpoint import layout, ranks
from megatron.checkpoint.errors import CheckpointError, NoCheckpointError
from megatron.checkpoint.fill import fill_engine
from megatron.checkpoint.find import find_checkpoint, find_checkpoint_together
from megatron.checkpoint.held import Share, base_optimizer
from megatron.checkpoint.logical import LogicalCheckpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.names import is_derived, logical_name, one_name
from megatron.checkpoint.random_state import derive_random_state, restore_random_state
from megatron.checkpoint.reading import read_file
from megatron.checkpoint.stored import client_state_of, inspect_checkpoint
from megatron.checkpoint.sums import check_sums
from megatron.checkpoint.vocabulary import TABLE
from megatron.checkpoint.weights import Expected, ModelWeights, load_model_weights
from megatron.mpu.topology import Layout, Topology

__all__ = [
    "CheckpointError",
    "Expected",
    "ModelWeights",
    "NoCheckpointError",
    "find_checkpoint",
    "find_checkpoint_together",
    "load_checkpoint",
    "load_model_weights",
]

MAX_LISTED = 4
PADDING_ARGS = frozenset({"make_vocab_size_divisible_by", "padded_vocab_size", "model_parallel_size"})
AVERAGES = ("exp_avg", "exp_avg_sq")
WEIGHTS_ALONE = "add `-o no_load_optim=true` to continue from the weights with a new optimizer state"

log = logging.getLogger(__name__)


def load_checkpoint(
    engine: Any,
    path: Path | str,
    *,
    load_optimizer: bool = True,
    load_rng: bool = True,
    expected: Expected | None = None,
    share: Share | None = None,
) -> dict[str, Any]:
    """Loads the checkpoint at `path` (from find_checkpoint, which checks its files) and returns its client state. Collective: every rank calls it.

    The checkpoint may be of any layout (data, tensor, pipeline and expert parallelism, ZeRO stage, number format) and so may this run (`share`;
    None: data parallelism alone). `load_optimizer` False takes the weights only (`no_load_optim`, `finetune`) and leaves the engine's step counters
    alone. What was translated or decided on the way is logged. Afterwards the checksum of every tensor is compared with the checkpoint's.
    Raises CheckpointError on every rank: before anything is changed when the checkpoint does not fit the model, and after it when a checksum differs.
    """
    path, expected = Path(path), expected or Expected()
    share = share or Share(Topology(ranks.world_size(), ranks.rank()))
    own_shapes = ranks.together(lambda: module_shapes(engine.module, share))
    shapes = {name: shape for process in ranks.gather(own_shapes or {}) for name, shape in process.items()}
    checked = ranks.together(lambda: _checked(engine, path, expected, shapes, load_optimizer=load_optimizer))
    assert checked is not None
    as_saved = all(ranks.gather(load_optimizer and is_as_saved(engine, checked, share)))
    random_state = ranks.together(lambda: _random_state(checked.checkpoint, share)) if load_rng else None
    for notice in checked.notices:
        log.info("%s", notice)
    if as_saved:
        _load_as_saved(engine, path, expected)
    else:
        fill_engine(engine, checked.checkpoint, share, optimizer=load_optimizer)
    check_sums(path, engine, share, optimizer=load_optimizer)
    if random_state is not None:
        random_state()
    client_state = _unmapped(client_state_of(path, checked.checkpoint.head))
    checked.checkpoint.close()
    return client_state


class Checked(NamedTuple):
    """A checkpoint that fits the model. `vocabulary_changed`: rows that only fill up the vocabulary are cut off or added."""

    checkpoint: LogicalCheckpoint
    notices: tuple[str, ...]
    vocabulary_changed: bool


def _checked(engine: Any, path: Path, expected: Expected, shapes: Mapping[str, tuple[int, ...]], *, load_optimizer: bool) -> Checked:
    if load_optimizer:
        check_has_optimizer(path)
    checkpoint = LogicalCheckpoint(path, expected, optimizer=load_optimizer)
    check_args(path, client_state_of(path, checkpoint.head).get("args") or {}, expected.args)
    try:
        padded = checkpoint.check_vocabulary(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    stored = {name: shapes[name] if padded and TABLE.search(name) and name in shapes else shape for name, shape in checkpoint.shapes.items()}
    check_shapes(path, stored, shapes)
    notices = [*checkpoint.notices, *([f"{path}: {padded}"] if padded else [])]
    if load_optimizer:
        check_adam_state(path, engine, checkpoint)
        formats = sorted({name_of(dtype) for name, dtype in checkpoint.dtypes.items() if dtype.is_floating_point and name in shapes})
        here = sorted({name_of(tensor.dtype) for tensor in engine.module.state_dict().values() if tensor.is_floating_point()})
        if formats != here:
            notices.append(f"{path} was trained in {' and '.join(formats)}; this run goes on in {' and '.join(here)}.")
    return Checked(checkpoint, tuple(notices), padded is not None)


def is_as_saved(engine: Any, checked: Checked, share: Share) -> bool:
    """Whether DeepSpeed itself can read the files: this program wrote them, nothing divides the model, and stage, format and processes are the same.

    Otherwise this process puts the tensors in one by one, which gives the same numbers.
    """
    manifest, table = read_manifest(checked.checkpoint.path), checked.checkpoint.table
    if manifest is None or checked.vocabulary_changed or share.topology.layout != Layout() or (table is not None and table.is_divided):
        return False
    stage = int(engine.zero_optimization_stage())
    if manifest.facts.get("zero_stage") != stage or (stage > 0 and manifest.facts.get("world_size") != ranks.world_size()):
        return False
    if manifest.facts.get(layout.RESHAPED) or checked.checkpoint.is_bf16_form != hasattr(engine.optimizer, "fp32_groups_flat_partition"):
        return False
    dtypes = checked.checkpoint.dtypes
    return all(dtypes.get(name, tensor.dtype) == tensor.dtype for name, tensor in engine.module.state_dict().items())


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16`, `float32`, ..."""
    return str(dtype).removeprefix("torch.")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def module_shapes(module: nn.Module, share: Share | None = None) -> dict[str, tuple[int, ...]]:
    """Every parameter and persistent buffer of a model with the shape of the whole weight, also when ZeRO 3 or `share` has cut it up."""
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in module.state_dict(keep_vars=True).items()}
    if share is None:
        return shapes
    return {one_name(logical_name(name)): share.cut_of(logical_name(name), shape).shape for name, shape in shapes.items()}


def check_args(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming each of NeoX's `args` that differs (heads, for one, change the model but no shape).

    Args not stored are not compared, nor those that only say how the vocabulary is padded or on how many processes the model lay.
    """
    different = [
        f"{key} is {stored[key]!r} in the checkpoint and {value!r} in this run"
        for key, value in expected.items()
        if key in stored and key not in PADDING_ARGS and stored[key] != value
    ]
    if different:
        raise CheckpointError(f"{path} is a checkpoint of another model: {'; '.join(different)}. Load it with the configuration of its training.")


def check_shapes(path: Path, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError naming the first weights that differ in shape or exist on one side only; what is derived is not compared."""
    stored, expected = ({name: shape for name, shape in shapes.items() if not is_derived(name)} for shapes in (stored, expected))
    different = [
        f"{name} is {list(stored[name])} in the checkpoint and {list(shape)} in this run"
        for name, shape in expected.items()
        if stored.get(name, shape) != shape
    ]
    missing = [f"{name} {list(shape)} is missing in the checkpoint" for name, shape in expected.items() if name not in stored]
    extra = [f"{name} {list(shape)} is in the checkpoint but not in the model" for name, shape in stored.items() if name not in expected]
    problems = different + missing + extra
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"{path} is a checkpoint of a model with other weights: {'; '.join(problems[:MAX_LISTED])}{more}. "
            f"Load it with the configuration of its training ({path / layout.CONFIGS})."
        )


def check_has_optimizer(path: Path) -> None:
    """Raises CheckpointError when there is no optimizer state at all."""
    files = [*layout.matching_files(path, layout.OPTIMIZER_FILE_PATTERN), *layout.matching_files(path, layout.LAYER_OPTIMIZER_FILE_PATTERN)]
    heads = [read_file(file, mmap=True) for file in layout.matching_files(path, layout.MODEL_FILE_PATTERN)[:1]]
    if not files and not any(isinstance(head, dict) and head.get("optimizer") for head in heads):
        raise CheckpointError(f"{path} holds no optimizer state (it was saved with no_save_optim, or converted): {WEIGHTS_ALONE}.")


def check_adam_state(path: Path, engine: Any, checkpoint: LogicalCheckpoint) -> None:
    """Raises CheckpointError when the optimizer is Adam, and the checkpoint holds only one of its averages of a weight, or none of any weight."""
    if type(base_optimizer(engine)).__name__.removeprefix("Skipping") not in ("Adam", "AdamW", "KernelAdam"):
        return
    missing = [name for name in checkpoint.sources.by_name if checkpoint.kinds(name) and not set(AVERAGES) <= set(checkpoint.kinds(name))]
    if missing or (not checkpoint.has_optimizer and any(checkpoint.sources.steps.values())):
        raise CheckpointError(
            f"The optimizer's state in {path} is not Adam's: it does not hold both averages of {missing[0] if missing else 'any weight'}. Add "
            "`-o no_load_optim=true` to continue from the weights with a new optimizer state."
        )


def _random_state(checkpoint: LogicalCheckpoint, share: Share) -> Callable[[], None] | None:
    """Sets this rank's random states; None where this rank keeps its own. Raises CheckpointError when the checkpoint has none for it."""
    path, state = checkpoint.path, client_state_of(checkpoint.path, checkpoint.head)
    manifest, topology = read_manifest(path), share.topology
    saved = Layout() if checkpoint.table is None else checkpoint.table.topology.layout
    processes = topology.world_size if manifest is None else manifest.facts.get("world_size", topology.world_size)
    reshaped = manifest is not None and manifest.facts.get(layout.RESHAPED)
    if reshaped or (processes, saved) != (topology.world_size, topology.layout):
        log.info(
            "%s was saved by %d process(es) with %s; this run has %d with %s. The random states of dropout follow from seed, step and data-parallel "
            "rank from here on.", path, processes, described(saved), topology.world_size, described(topology.layout)
        )  # fmt: skip
        return partial(derive_random_state, seed=share.seed, iteration=int(state.get("iteration", 0)), data_parallel_rank=topology.data_parallel_rank)
    if ranks.rank() == 0:
        return partial(restore_random_state, state)
    if manifest is None and layout.GQA_LAYOUT_KEY not in checkpoint.head:
        return None  # GPT-NeoX stores one process's, and would give it to all
    file = path / layout.random_state_file(ranks.rank())
    if not file.exists():
        raise CheckpointError(
            f"{path} holds no random state for process {ranks.rank()} ({file.name} is missing), because it was saved with no_save_rng. Add "
            "`-o no_load_rng=true` to continue with new random states."
        )
    return partial(restore_random_state, read_file(file, mmap=False))


def described(parallel: Layout) -> str:
    """`tensor 2, pipe 1, expert 1`."""
    return ", ".join(f"{name} {size}" for name, size in parallel._asdict().items())


def _load_as_saved(engine: Any, path: Path, expected: Expected) -> None:
    from megatron.checkpoint.engine import checkpoint_engine, without_wildcards  # imports DeepSpeed, which reading weights does without

    stored = inspect_checkpoint(path)
    weights = stored.shards[0] if stored.is_zero3 else load_model_weights(path, expected).state_dict
    with checkpoint_engine(engine, change=lambda content: {**content, "module": weights}), without_wildcards(path.parent) as directory:
        loaded, _ = engine.load_checkpoint(str(directory), tag=path.name)
    assert loaded is not None, path


def _unmapped(value: Any) -> Any:
    """A copy that does not depend on the file any more."""
    if isinstance(value, dict):
        return {key: _unmapped(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unmapped(entry) for entry in value)
    return value.clone() if hasattr(value, "clone") else value
