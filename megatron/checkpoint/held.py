"""What a process's engine holds of every weight: the weight itself, its float32 copy and its optimizer state, whichever ZeRO stage has cut them up.

ZeRO 0      the whole of the process's tensor; the copy is the weight itself in float32, or MasterWeights' copy
ZeRO 1, 2   a run of the flattened tensor, in one long float32 tensor for a group of weights; the weight is whole
ZeRO 3      a run of the flattened tensor: elements r ceil(n / W) on of data-parallel process r of W; the weight as well
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.names import logical_name, one_name
from megatron.model.division import Cut, Cuts, whole_cut
from megatron.mpu.topology import Topology

WEIGHT, MASTER = "weight", "master"
"""Kinds of tensors beside the optimizer's own names (`exp_avg`, ...): the weight in the format it computes in, and its float32 copy."""


@dataclass(frozen=True)
class Share:
    """This process's share of a run."""

    topology: Topology = field(default_factory=Topology)
    cuts: Cuts = field(default_factory=dict)
    """What it holds of each weight. Weights that are not in it: all of it."""
    seed: int = 0
    """The run's seed, for new random states."""

    def cut_of(self, name: str, shape: tuple[int, ...]) -> Cut:
        """The part of a weight that this process's tensor of `shape` is. Raises CheckpointError if the table says something else."""
        cut = self.cuts.get(name) or whole_cut(shape, owned=self.topology.tensor_rank == 0)
        if cut.local_shape != shape:
            raise CheckpointError(f"{name} has shape {list(shape)} on this process, but its table of parts says {list(cut.local_shape)}.")
        return cut

    @property
    def counts_replicated(self) -> bool:
        """Whether this process may count for what data-parallel processes hold alike: the first ones do, as many as share the experts."""
        return self.topology.data_parallel_rank < self.topology.layout.expert


class Held(NamedTuple):
    """One tensor of an engine: elements from `start` on of the flattened part `cut` of a weight. `values` is a view: writing it changes the
    engine."""

    name: str
    cut: Cut
    start: int
    values: Tensor


class Slot(NamedTuple):
    """Where the optimizer works on a weight: at `length` elements of the tensor `flat` from `place` on, which are the weight's from `start` on.

    `has_master`: `flat` is a float32 copy, and not the weight itself."""

    name: str
    cut: Cut
    start: int
    length: int
    flat: Tensor
    place: int
    has_master: bool

    def view(self, values: Tensor) -> Held:
        """Its part of a tensor that is laid out as `flat`."""
        return Held(self.name, self.cut, self.start, values.detach().view(-1)[self.place : self.place + self.length])


def held_weights(engine: Any, share: Share) -> Iterator[Held]:
    """Every parameter and persistent buffer."""
    for engine_name, tensor in engine.module.state_dict(keep_vars=True).items():
        name, shape = logical_name(engine_name), tuple(getattr(tensor, "ds_shape", tensor.shape))
        cut = share.cut_of(name, shape)
        if not hasattr(tensor, "ds_tensor"):
            yield Held(one_name(name), cut, 0, tensor.detach().view(-1))
            continue
        start, count = _third_stage_run(tensor, torch.distributed.get_rank(group=tensor.ds_process_group))
        if count:
            yield Held(one_name(name), cut, start, tensor.ds_tensor.detach().view(-1)[:count])


def optimizer_slots(engine: Any, share: Share) -> list[Slot]:
    """Every weight that is trained. Raises CheckpointError for an optimizer that this program does not know."""
    names = {id(parameter): logical_name(name) for name, parameter in engine.module.named_parameters()}

    def slot(parameter: Tensor, start: int, count: int, flat: Tensor, place: int, *, has_master: bool = True) -> Slot:
        name = names[id(parameter)]
        cut = share.cut_of(name, tuple(getattr(parameter, "ds_shape", parameter.shape)))
        return Slot(one_name(name), cut, start, count, flat, place, has_master)

    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return [slot(*run) for run in _third_stage(optimizer)]
    if hasattr(optimizer, "round_robin_bit16_groups"):
        groups = zip(
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.single_partition_of_fp32_groups,
            optimizer.real_dp_process_group,
            strict=True,
        )
        return [slot(*run) for group in groups for run in _flat_runs(*group)]
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        groups = zip(
            optimizer.bf16_groups,
            [_offsets(group) for group in optimizer.bf16_groups],
            optimizer.fp32_groups_flat_partition,
            optimizer.real_dp_process_group,
            strict=True,
        )
        return [slot(*run) for group in groups for run in _flat_runs(*group)]
    if (copies := _one_by_one(optimizer)) is not None:
        return [slot(weight, 0, weight.numel(), master, 0) for weight, master in copies]
    if isinstance(optimizer, torch.optim.Optimizer):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        return [slot(weight, 0, weight.numel(), weight, 0, has_master=False) for weight in weights]
    raise CheckpointError(f"The optimizer is a {type(optimizer).__name__}: this program does not know where its state lies.")


def base_optimizer(engine: Any) -> Any:
    """The optimizer inside DeepSpeed's wrappers and ours, whose `state` is by tensor (`Slot.flat`)."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def held_optimizer(engine: Any, slots: list[Slot]) -> Iterator[tuple[str, Held]]:
    """Every float32 copy and every tensor of the optimizer's state, with its kind."""
    state = base_optimizer(engine).state
    for slot in slots:
        if slot.has_master:
            yield MASTER, slot.view(slot.flat)
        for kind, values in state.get(slot.flat, {}).items():
            if is_element_state(values, slot.flat):
                yield kind, slot.view(values)


def is_element_state(values: Any, of: Tensor) -> bool:
    """Whether a part of the optimizer's state has an entry for every element of a tensor. Counts of steps have not."""
    return isinstance(values, Tensor) and values.dim() > 0 and values.numel() == of.numel()


def optimizer_order(engine: Any) -> list[list[str]]:
    """The names of the weights in the order of the optimizer's groups, where it works on the weights or their copies one by one; else empty."""
    if not isinstance(engine.optimizer, torch.optim.Optimizer) and _one_by_one(engine.optimizer) is None:
        return []
    slots = iter(optimizer_slots(engine, _WithoutTable()))
    return [[next(slots).name for _ in group["params"]] for group in base_optimizer(engine).param_groups]


class _WithoutTable(Share):
    """Takes every tensor for the whole weight, where only names are asked for."""

    def cut_of(self, name: str, shape: tuple[int, ...]) -> Cut:
        return whole_cut(shape)


def _one_by_one(optimizer: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Weights and their float32 copies, where each has its own: MasterWeights, and DeepSpeed's wrapper for any optimizer. None: another optimizer."""
    if hasattr(optimizer, "masters"):
        return list(zip(optimizer.weights, optimizer.masters, strict=True))
    if hasattr(optimizer, "fp32_groups") and hasattr(optimizer, "fp16_groups"):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return [pair for weights, masters in groups for pair in zip(weights, masters, strict=True)]
    return None


def _flat_runs(weights: list[Tensor], offsets: list[int], flat: Tensor, group: Any) -> Iterator[tuple[Tensor, int, int, Tensor, int]]:
    """Of weights that lie one after the other: those elements that are in this process's part of equally long parts."""
    begin = torch.distributed.get_rank(group=group) * flat.numel()
    end = begin + flat.numel()
    for weight, offset in zip(weights, offsets, strict=True):
        first, last = max(offset, begin), min(offset + weight.numel(), end)
        if first < last:
            yield weight, first - offset, last - first, flat, first - begin


def _third_stage(optimizer: Any) -> Iterator[tuple[Tensor, int, int, Tensor, int]]:
    for number, (weights, flat) in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)):
        rank, place = torch.distributed.get_rank(group=optimizer.sub_group_process_groups[number]), 0
        for weight in weights:
            start, count = _third_stage_run(weight, rank)
            if flat.numel() and count:
                yield weight, start, count, flat, place
            place += weight.partition_numel()


def _third_stage_run(weight: Any, rank: int) -> tuple[int, int]:
    length = weight.ds_tensor.ds_numel
    start = min(rank * length, weight.ds_numel)
    return start, min(length, weight.ds_numel - start)


def _offsets(weights: list[Tensor]) -> list[int]:
    offsets, place = [], 0
    for weight in weights:
        offsets.append(place)
        place += weight.numel()
    return offsets
