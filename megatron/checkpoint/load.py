"""Putting a checkpoint into a DeepSpeed engine: everything is compared first, so that an engine is either loaded or untouched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from megatron.checkpoint import layout, ranks
from megatron.checkpoint.errors import CheckpointError, NoCheckpointError
from megatron.checkpoint.find import find_checkpoint, find_checkpoint_together
from megatron.checkpoint.random_state import restore_random_state
from megatron.checkpoint.reading import read_file
from megatron.checkpoint.weights import ModelWeights, StoredCheckpoint, inspect_checkpoint, load_model_weights

__all__ = [
    "CheckpointError",
    "ModelWeights",
    "NoCheckpointError",
    "find_checkpoint",
    "find_checkpoint_together",
    "load_checkpoint",
    "load_model_weights",
]

MAX_LISTED = 4


def load_checkpoint(
    engine: Any, path: Path | str, *, load_optimizer: bool = True, load_rng: bool = True, expected_args: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Loads the checkpoint at `path` (from find_checkpoint, which checks its files) and returns its client state. Collective: every rank calls it.

    `load_optimizer` False takes the weights only (`no_load_optim`, `finetune`), from any number of processes and any ZeRO stage, and leaves the
    engine's step counters alone. `expected_args`: entries of NeoX's `args` that must be the same in the checkpoint.
    Raises CheckpointError, on every rank and before anything is changed, when the checkpoint does not fit the model or the processes.
    """
    path = Path(path)
    stored = ranks.together(lambda: _checked(engine, path, load_optimizer=load_optimizer, expected_args=expected_args))
    assert stored is not None
    random_state = ranks.together(lambda: _random_state(stored)) if load_rng else None
    if load_optimizer:
        _load_everything(engine, path)
    else:
        _load_weights(engine, path)
    if random_state is not None:
        restore_random_state(random_state)
    return _unmapped(stored.client_state)


def _checked(engine: Any, path: Path, *, load_optimizer: bool, expected_args: Mapping[str, Any] | None) -> StoredCheckpoint:
    stored = inspect_checkpoint(path)
    check_args(path, stored.client_state.get("args") or {}, expected_args or {})
    check_shapes(path, stored.shapes, module_shapes(engine.module))
    if load_optimizer:
        check_processes(stored, int(engine.zero_optimization_stage()), int(engine.seq_dp_world_size))
        check_precision(stored, engine)
    return stored


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and persistent buffer of a model with its full shape, also when ZeRO 3 has cut it up."""
    return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in module.state_dict(keep_vars=True).items()}


def check_args(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises CheckpointError when one of NeoX's `args` differs (heads, for one, change the model but no shape). Args not stored are not compared."""
    different = [f"{key} is {stored[key]!r} there and {value!r} here" for key, value in expected.items() if key in stored and stored[key] != value]
    if different:
        raise CheckpointError(f"{path} is a checkpoint of another model: {'; '.join(different)}. Load it with the configuration it was trained with.")


def check_shapes(path: Path, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError naming the first parameters that differ in shape or exist on one side only."""
    different = [
        f"{name} is {list(stored[name])} there and {list(shape)} here" for name, shape in expected.items() if stored.get(name, shape) != shape
    ]
    missing = [f"{name} {list(shape)} is not there" for name, shape in expected.items() if name not in stored]
    extra = [f"{name} {list(shape)} is there but not in the model" for name, shape in stored.items() if name not in expected]
    problems = different + missing + extra
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"{path} is a checkpoint of another shape: {'; '.join(problems[:MAX_LISTED])}{more}. "
            f"Load it with the configuration it was trained with ({path / layout.CONFIGS})."
        )


def check_processes(stored: StoredCheckpoint, zero_stage: int, world_size: int) -> None:
    """Raises CheckpointError when the optimizer state is cut up in a way that this run cannot read.

    Stage 0 loads at any number of processes; stages 1 and 2 read each other's files; stages 1 to 3 need the number of processes they were saved by.
    """
    advice = "or add `-o no_load_optim=true` to go on from the weights alone with a fresh optimizer"
    if layout.matching_files(stored.path, layout.LAYER_FILE_PATTERN):
        raise CheckpointError(f"{stored.path} was saved by a pipeline (layer_*.pt), whose optimizer state cannot be read: {advice[3:]}.")
    same_layout = stored.zero_stage == zero_stage or {stored.zero_stage, zero_stage} == {1, 2}
    if not same_layout:
        raise CheckpointError(
            f"{stored.path} was saved with zero_optimization stage {stored.zero_stage}, this run uses stage {zero_stage}, and its optimizer state is "
            f"laid out differently: set stage {stored.zero_stage}, {advice}."
        )
    if zero_stage > 0 and stored.world_size != world_size:
        raise CheckpointError(
            f"{stored.path} was saved by {stored.world_size} data-parallel processes with zero_optimization stage {stored.zero_stage}, which cuts "
            f"the optimizer's state into as many parts; this run has {world_size}: start {stored.world_size} processes, {advice}."
        )


def check_precision(stored: StoredCheckpoint, engine: Any) -> None:
    """Raises CheckpointError when the weights were trained in another precision: the optimizer's state would not fit or be rounded."""
    floating = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.model["module"].values() if tensor.is_floating_point()}
    here = {str(tensor.dtype).removeprefix("torch.") for tensor in engine.module.state_dict().values() if tensor.is_floating_point()}
    if floating != here:
        raise CheckpointError(
            f"{stored.path} was trained in {' and '.join(sorted(floating))}, this run uses {' and '.join(sorted(here))}: set the same `precision`, "
            "or add `-o no_load_optim=true` to go on from the weights alone with a fresh optimizer."
        )


def _random_state(stored: StoredCheckpoint) -> dict[str, Any]:
    """This rank's random states. Raises CheckpointError when the checkpoint has none for it."""
    if ranks.rank() == 0:
        return stored.client_state
    file = stored.path / layout.random_state_file(ranks.rank())
    if not file.exists():
        raise CheckpointError(
            f"{stored.path} holds no random state for process {ranks.rank()} ({file.name} is missing): it was saved by fewer processes or with "
            "no_save_rng. Add `-o no_load_rng=true` to go on with fresh random states."
        )
    return read_file(file, mmap=False)


def _load_everything(engine: Any, path: Path) -> None:
    from megatron.checkpoint.engine import checkpoint_engine, without_wildcards  # imports DeepSpeed, which reading weights does without

    with checkpoint_engine(engine), without_wildcards(path.parent) as directory:
        loaded, _ = engine.load_checkpoint(str(directory), tag=path.name)
    assert loaded is not None, path


def _load_weights(engine: Any, path: Path) -> None:
    """Weights into any engine. DeepSpeed's own way for ZeRO 3 reads through `latest` and unpickles what it finds, so it is not used."""
    weights = load_model_weights(path).state_dict
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    engine.load_module_state_dict({"module": weights}, strict=True, fetch_z3_params=engine.zero_optimization_partition_weights())
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def _unmapped(value: Any) -> Any:
    """A copy that does not depend on the file any more."""
    if isinstance(value, dict):
        return {key: _unmapped(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unmapped(entry) for entry in value)
    return value.clone() if hasattr(value, "clone") else value
