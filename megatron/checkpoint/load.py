"""Putting a checkpoint into a DeepSpeed engine: everything is compared first, so that an engine is either loaded or untouched."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from megatron.checkpoint import layout, ranks
from megatron.checkpoint.adam_state import check_adam_state, pytorch_form
from megatron.checkpoint.errors import CheckpointError, NoCheckpointError
from megatron.checkpoint.find import find_checkpoint, find_checkpoint_together
from megatron.checkpoint.names import is_derived
from megatron.checkpoint.random_state import restore_random_state
from megatron.checkpoint.reading import read_file
from megatron.checkpoint.stored import StoredCheckpoint, inspect_checkpoint
from megatron.checkpoint.weights import Expected, ModelWeights, load_model_weights

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
WEIGHTS_ALONE = "add `-o no_load_optim=true` to continue from the weights with a new optimizer state"

log = logging.getLogger(__name__)


def load_checkpoint(
    engine: Any, path: Path | str, *, load_optimizer: bool = True, load_rng: bool = True, expected: Expected | None = None
) -> dict[str, Any]:
    """Loads the checkpoint at `path` (from find_checkpoint, which checks its files) and returns its client state. Collective: every rank calls it.

    `load_optimizer` False takes the weights only (`no_load_optim`, `finetune`), from any number of processes and any ZeRO stage, and leaves the
    engine's step counters alone. What was translated or decided on the way is logged.
    Raises CheckpointError, on every rank and before anything is changed, when the checkpoint does not fit the model or the processes.
    """
    path, expected = Path(path), expected or Expected()
    checked = ranks.together(lambda: _checked(engine, path, expected, load_optimizer=load_optimizer))
    assert checked is not None
    random_state = ranks.together(lambda: _random_state(checked.stored)) if load_rng else None
    for notice in checked.notices:
        log.info("%s", notice)
    if load_optimizer:
        _load_everything(engine, checked)
    else:
        _load_weights(engine, checked.weights)
    if random_state is not None:
        restore_random_state(random_state)
    return _unmapped(checked.stored.client_state)


class Checked(NamedTuple):
    """A checkpoint that fits, with its weights in today's form (under ZeRO 3 with its optimizer: empty, DeepSpeed reads them)."""

    stored: StoredCheckpoint
    weights: dict[str, Tensor]
    notices: tuple[str, ...]


def _checked(engine: Any, path: Path, expected: Expected, *, load_optimizer: bool) -> Checked:
    stored = inspect_checkpoint(path)
    check_args(path, stored.client_state.get("args") or {}, expected.args)
    if load_optimizer:
        check_optimizer(stored, int(engine.zero_optimization_stage()), int(engine.seq_dp_world_size))
    if load_optimizer and stored.is_zero3:
        check_shapes(path, stored.shapes, module_shapes(engine.module))
        check_precision(path, stored.shards[0], engine)
        return Checked(stored, stored.shards[0], ())
    loaded = load_model_weights(path, expected)
    check_shapes(path, shapes_of(loaded.state_dict), module_shapes(engine.module))
    if load_optimizer:
        check_precision(path, loaded.state_dict, engine)
        if loaded.vocabulary_changed:
            raise CheckpointError(f"{path}: its vocabulary is padded differently, so its optimizer's state does not fit: {WEIGHTS_ALONE}.")
        if not stored.is_own:
            check_adam_state(path, stored.head["optimizer"], engine.optimizer.param_groups)
    return Checked(stored, loaded.state_dict, loaded.notices)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and persistent buffer of a model with its full shape, also when ZeRO 3 has cut it up."""
    return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in module.state_dict(keep_vars=True).items()}


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


def check_optimizer(stored: StoredCheckpoint, zero_stage: int, world_size: int) -> None:
    """Raises CheckpointError when there is no optimizer state, or it is cut up in a way that this run cannot read.

    Stage 0 loads at any number of processes; stages 1 and 2 read each other's files; stages 1 to 3 need the number of processes they were saved by.
    """
    if not stored.has_optimizer:
        raise CheckpointError(f"{stored.path} holds no optimizer state (it was saved with no_save_optim, or converted): {WEIGHTS_ALONE}.")
    if len(stored.shards) > 1 or len(stored.model_files) > 1:
        count = max(len(stored.shards), len(stored.model_files))
        raise CheckpointError(
            f"{stored.path} was saved by {count} processes that divided the model. Such an optimizer state cannot be read: {WEIGHTS_ALONE}."
        )
    saved_stage = stored.zero_stage()
    if not stored.is_own and (saved_stage or zero_stage):
        raise CheckpointError(
            f"{stored.path} was written by another program with zero_optimization stage {saved_stage}; its optimizer state can be read only if both "
            f"it and this run ({zero_stage}) use stage 0: {WEIGHTS_ALONE}."
        )
    if saved_stage != zero_stage and {saved_stage, zero_stage} != {1, 2}:
        raise CheckpointError(
            f"{stored.path} was saved with zero_optimization stage {saved_stage}, but this run uses stage {zero_stage}. The optimizer "
            "states of the two stages have "
            f"different forms: set stage {saved_stage}, or {WEIGHTS_ALONE}."
        )
    if zero_stage > 0 and stored.world_size != world_size:
        raise CheckpointError(
            f"{stored.path} was saved by {stored.world_size} data-parallel processes with zero_optimization stage {saved_stage}, which cuts "
            f"the optimizer's state into as many parts; this run has {world_size}: start {stored.world_size} processes, or {WEIGHTS_ALONE}."
        )


def check_precision(path: Path, weights: Mapping[str, Tensor], engine: Any) -> None:
    """Raises CheckpointError when the weights were trained in another precision: the optimizer's state would not fit or be rounded."""
    floating, here = (
        {str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items() if tensor.is_floating_point() and not is_derived(name)}
        for state in (weights, engine.module.state_dict())
    )
    if floating != here:
        raise CheckpointError(
            f"{path} was trained in {' and '.join(sorted(floating))}, but this run uses {' and '.join(sorted(here))}: set the same `precision`, "
            f"or {WEIGHTS_ALONE}."
        )


def _random_state(stored: StoredCheckpoint) -> dict[str, Any] | None:
    """This rank's random states; None where this rank keeps its own. Raises CheckpointError when the checkpoint has none for it."""
    if ranks.rank() == 0:
        return stored.client_state
    if not stored.is_own:
        return None  # GPT-NeoX stores one process's, and would give it to all
    file = stored.path / layout.random_state_file(ranks.rank())
    if not file.exists():
        raise CheckpointError(
            f"{stored.path} holds no random state for process {ranks.rank()} ({file.name} is missing). The checkpoint was saved by fewer "
            "processes or with "
            "no_save_rng. Add `-o no_load_rng=true` to continue with new random states."
        )
    return read_file(file, mmap=False)


def _load_everything(engine: Any, checked: Checked) -> None:
    from megatron.checkpoint.engine import checkpoint_engine, without_wildcards  # imports DeepSpeed, which reading weights does without

    stored = checked.stored

    def in_todays_form(content: dict[str, Any]) -> dict[str, Any]:
        content = {**content, "module": checked.weights}
        if stored.is_own:
            return content
        steps = int(content.get("global_steps") or stored.client_state.get("iteration") or 0)
        content["optimizer"] = pytorch_form(content["optimizer"], engine.optimizer.param_groups, steps=steps)
        return {**dict.fromkeys(("dp_world_size", "mp_world_size"), 1), "global_steps": steps, "skipped_steps": 0, **content}

    with checkpoint_engine(engine, change=in_todays_form), without_wildcards(stored.path.parent) as directory:
        loaded, _ = engine.load_checkpoint(str(directory), tag=stored.path.name)
    assert loaded is not None, stored.path


def _load_weights(engine: Any, weights: dict[str, Tensor]) -> None:
    """Weights into any engine. DeepSpeed's own way for ZeRO 3 reads through `latest` and unpickles what it finds, so it is not used."""
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
