"""Records what one process does in a step on the meta device: kernels, messages, memory. Nothing is computed.

What data would decide is decided here: how many choices of experts are real, and how many rows come from other processes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.analysis.plan.work import Work, work_of


class Message(NamedTuple):
    """A collective operation of a process, or a tensor that it sends."""

    collective: str
    """PyTorch's name: `allreduce_`, `allgather_`, `alltoall_base_`, `send`, ..."""
    group: str
    """The kind of the group: `tensor`, `expert`, `data`, `pipe`, ..."""
    payload: int
    """Bytes: of the whole result for a gather, of the whole input for a reduction, of the larger side for an exchange."""


@dataclass
class Trace:
    """A step of one micro-batch: forward and backward."""

    work: Counter[Work] = field(default_factory=Counter)
    messages: Counter[Message] = field(default_factory=Counter)
    kept: int = 0
    """Bytes that the forward keeps for the backward, without weights."""
    peak: int = 0
    """The most bytes that lay in memory at once, without weights, gradients of weights and what was there before."""

    @property
    def flops(self) -> float:
        """Floating-point operations, those of recomputation included."""
        return sum(work.flops * count for work, count in self.work.items())

    @property
    def kernels(self) -> int:
        """How many kernels are started."""
        return sum(self.work.values())


class Recorder(TorchDispatchMode):
    """Inside it every operator is recorded. `kinds`: the name of each process group -> its kind. `real`: the share of an expert layer's padded
    choices that are real.
    """

    def __init__(self, kinds: Mapping[str, str], *, real: float) -> None:
        super().__init__()
        self.kinds, self.real, self.trace = kinds, real, Trace()
        self._live: dict[int, int] = {}
        self.bytes_live = 0
        self._left_out: set[int] = set()

    def leave_out(self, tensors: Iterator[Tensor]) -> None:
        """These tensors do not count as live."""
        self._left_out |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in collective_ops:
            return self._collective(func, args, kwargs)
        out = self._decided(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if (work := work_of(func, args, out)) is not None and _on_device(args, out):
            self.trace.work[work] += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        return out

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        name = CollectiveOp.get_process_group(func, args).group_name
        payload = CollectiveOp.get_comm_tensor_size(func, out, args, kwargs)
        if _on_device(args, out):
            self.trace.messages[Message(func._schema.name.split("::")[1], self.kinds.get(name, "world"), payload)] += 1
        return out

    def _decided(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operator whose size depends on data."""
        rule = DECIDED.get(func._schema.name)
        return NotImplemented if rule is None else rule(self, args, kwargs)

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "meta" or key in self._live or key in self._left_out:
            return
        self._live[key] = storage.nbytes()
        self.bytes_live += storage.nbytes()
        self.trace.peak = max(self.trace.peak, self.bytes_live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.bytes_live -= self._live.pop(key, 0)


def _on_device(args: Any, out: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.device.type == "meta" for leaf in tree_leaves((args, out)))


def _sort(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    group_TK, num_groups, padded = args[:3]
    if not padded:
        return NotImplemented
    rows = max(1, round(group_TK.numel() * recorder.real))
    return group_TK.new_empty(rows), torch.empty_like(group_TK), group_TK.new_empty(num_groups)


def _bincount(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].new_empty(kwargs.get("minlength", args[2] if len(args) > 2 else 0), dtype=torch.int64)


DECIDED: Mapping[str, Callable[[Recorder, tuple[Any, ...], dict[str, Any]], Any]] = {"neox::sort_by_group": _sort, "aten::bincount": _bincount}


@contextmanager
def kept_bytes(weights: Iterator[Tensor]) -> Iterator[Callable[[], int]]:
    """Inside it the tensors that autograd saves are counted, each storage once, and not those of `weights`. It gives the sum so far."""
    left_out = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in left_out:
            kept[place] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
