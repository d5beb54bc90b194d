"""Putting a checkpoint of any layout into an engine of any other: weight by weight, each process the part that it holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import ranks
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.held import MASTER, WEIGHT, Held, Share, Slot, base_optimizer, held_weights, optimizer_slots
from megatron.checkpoint.layout import OPTIMIZER_FILE_PATTERN, matching_files
from megatron.checkpoint.logical import LogicalCheckpoint
from megatron.checkpoint.names import is_derived

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The state of a dynamic loss scale, under DeepSpeed's names."""


def fill_engine(engine: Any, checkpoint: LogicalCheckpoint, share: Share, *, optimizer: bool) -> None:
    """Weights, and with `optimizer` float32 copies, optimizer state, loss scale and step counters of a checkpoint that was compared with the engine's
    model before. Collective.

    Where the number formats differ, float32 values are rounded, and 16-bit weights come from their float32 copies. Raises CheckpointError on every
    rank.
    """
    if optimizer:
        ranks.together(lambda: check_fillable(engine))
    wrapper = engine.optimizer
    if hasattr(wrapper, "checkpoint_event_prologue"):
        wrapper.checkpoint_event_prologue()
    ranks.together(lambda: _fill(engine, checkpoint, share, optimizer=optimizer))
    if hasattr(wrapper, "checkpoint_event_epilogue"):
        wrapper.checkpoint_event_epilogue()


def _fill(engine: Any, checkpoint: LogicalCheckpoint, share: Share, *, optimizer: bool) -> None:
    with torch.no_grad():
        for held in held_weights(engine, share):
            _fill_weight(checkpoint, held)
        if optimizer:
            _fill_optimizer(engine, checkpoint, optimizer_slots(engine, share))
            _fill_counters(engine, checkpoint)
        elif hasattr(engine.optimizer, "refresh_fp32_params"):
            engine.optimizer.refresh_fp32_params()


def check_fillable(engine: Any) -> None:
    """Raises CheckpointError where the optimizer's state cannot be put in from another layout."""
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise CheckpointError(
            "the optimizer's state lies on NVMe (offload_optimizer: device: nvme): a checkpoint of another layout cannot be read into it. Load it "
            "without that once, and save"
        )
    if "bit" in type(base_optimizer(engine)).__name__:
        raise CheckpointError("the optimizer keeps its state in blocks of 8-bit numbers, which cannot be divided in another way")


def _fill_weight(checkpoint: LogicalCheckpoint, held: Held) -> None:
    if is_derived(held.name):
        return
    floating = held.values.is_floating_point()
    stored = checkpoint.dtypes.get(held.name)
    use_master = floating and stored != held.values.dtype and checkpoint.has(held.name, MASTER)
    _copy(held, checkpoint.read(held.name, MASTER if use_master else WEIGHT, held.cut))


def _fill_optimizer(engine: Any, checkpoint: LogicalCheckpoint, slots: list[Slot]) -> None:
    base = base_optimizer(engine)
    by_tensor: dict[int, list[Slot]] = defaultdict(list)
    for slot in slots:
        by_tensor[id(slot.flat)].append(slot)
    for members in by_tensor.values():
        flat = members[0].flat
        kinds = list(dict.fromkeys(kind for slot in members for kind in checkpoint.kinds(slot.name)))
        steps = max(checkpoint.sources.steps.get(slot.name, 0.0) for slot in members)
        if kinds or steps:
            state = base.state.setdefault(flat, {})
            for kind in kinds:
                if not isinstance(state.get(kind), Tensor):
                    state[kind] = torch.zeros_like(flat, requires_grad=False)
            _set_steps(base, state, flat, steps)
        for slot in members:
            if slot.has_master:
                _copy(slot.view(flat), checkpoint.read(slot.name, MASTER if checkpoint.has(slot.name, MASTER) else WEIGHT, slot.cut))
            for kind in checkpoint.kinds(slot.name):
                _copy(slot.view(base.state[flat][kind]), checkpoint.read(slot.name, kind, slot.cut))


def _copy(held: Held, part: Tensor) -> None:
    held.values.copy_(part.reshape(-1)[held.start : held.start + held.values.numel()])


def _set_steps(base: Any, state: dict[str, Any], flat: Tensor, steps: float) -> None:
    """PyTorch's optimizers count in a tensor for each weight, others in a number for each weight or each group. SGD and Lion do not count."""
    kind = next((kind.__module__ for kind in type(base).__mro__ if not kind.__module__.startswith("megatron.")), "")
    if kind.startswith("torch."):
        if "exp_avg_sq" in state:
            state["step"] = torch.tensor(steps, dtype=torch.float32, device=flat.device)
        return
    state["step"] = int(steps)
    for group in base.param_groups:
        group["step"] = int(steps)


def _fill_counters(engine: Any, checkpoint: LogicalCheckpoint) -> None:
    head = checkpoint.head
    engine.global_steps = int(head.get("global_steps") or head.get("iteration") or 0)
    engine.global_samples = int(head.get("global_samples") or engine.global_steps * engine.train_batch_size())
    engine.skipped_steps = int(head.get("skipped_steps") or 0)
    if engine.lr_scheduler is not None and head.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(head["lr_scheduler"])
    scaler, stored = getattr(engine.optimizer, "loss_scaler", None), stored_scaler(checkpoint)
    if getattr(scaler, "dynamic", False):
        for name in SCALER:
            if name in stored:
                setattr(scaler, name, stored[name])


def stored_scaler(checkpoint: LogicalCheckpoint) -> Mapping[str, Any]:
    """The loss scale of a run in fp16; empty where there is none."""
    optimizer = checkpoint.head.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("dynamic_loss_scale"):
        return optimizer
    files = matching_files(checkpoint.path, OPTIMIZER_FILE_PATTERN)
    if not files:
        return {}
    scaler = checkpoint.files.at(files[0], ("optimizer_state_dict",)).get("loss_scaler")
    return vars(scaler) if "cur_iter" in vars(scaler or object) else {}
