"""A stand-in of the package DeepEP over gloo, for CPUs. The real package has never run here.

It is written after the signatures, the docstrings and the tests of deepseek-ai/DeepEP: `Buffer` of version 1 (deep_ep/buffer.py, docs/legacy.md), and
`EPBuffer` of version 2.5 (deep_ep/buffers/ep.py), whose `dispatch` and `combine` are those of 2.0's `ElasticBuffer`. It keeps what a caller can see:

- a token is sent once to each process that has an expert for it; `recv_topk_idx` has that process's numbers, and -1 for experts of others
- before `event.current_stream_wait()` an asynchronous dispatch has no values (here: NaN)
- `EPBuffer` gives tokens in any order, unless it is `deterministic`; `Buffer` in the order of (process, token)
- weights of experts of others are the sender's in `EPBuffer`, and 0 in `Buffer`
- `combine` adds up without the router's weights. `topk_weights` are added up in `Buffer`; `EPBuffer` takes each from the process of its expert
- a dispatch with a handle takes neither choices nor weights, and gives tokens alone
- what is refused: other formats than `FORMAT` (bfloat16), weights that are not float32, rows that are not contiguous, widths that 256 does not divide
  (`EPBuffer`), more tokens than the buffer was made for, and a number of SMs that is not given beside a handle

Unlike the package it knows no streams, and it adds in the format of the rows.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


class Settings:
    """What a test may change."""

    FORMAT: ClassVar[torch.dtype] = torch.bfloat16
    """Float64 shows the arithmetic without rounding."""
    calls: ClassVar[list[str]] = []


class Event:
    """`EventOverlap`: it fills in what was received."""

    def __init__(self, targets: list[tuple[Tensor, Tensor]]) -> None:
        self.targets = targets

    def current_stream_wait(self) -> None:
        for target, values in self.targets:
            target.copy_(values)
        self.targets = []


@dataclass
class Handle:
    """`EPHandle`; the tuple of version 1 is opaque, and here it is the same."""

    sent: list[Tensor]
    """For each process: the tokens that were sent there."""
    received: list[int]
    order_S: Tensor
    """From the order of arrival to that of the tokens that were given to the caller."""
    tokens: int
    topk_idx: Tensor
    num_experts: int
    num_sms: int = 4


@dataclass
class ElasticDispatch:
    """What `EPBuffer.dispatch` takes beside the tokens, as far as it is used here, with its defaults."""

    topk_idx: Tensor | None = None
    topk_weights: Tensor | None = None
    num_experts: int | None = None
    num_sms: int = 0
    async_with_compute_stream: bool = False
    handle: Handle | None = None


@dataclass
class FirstDispatch:
    """The same of `Buffer.dispatch`."""

    handle: Handle | None = None
    num_tokens_per_rank: Tensor | None = None
    num_tokens_per_rdma_rank: Tensor | None = None
    is_token_in_rank: Tensor | None = None
    num_tokens_per_expert: Tensor | None = None
    topk_idx: Tensor | None = None
    topk_weights: Tensor | None = None
    async_finish: bool = False


def all_to_all(parts: list[Tensor], group: Any) -> list[Tensor]:
    """One tensor from each process; the first dimension differs."""
    sizes = torch.empty(len(parts), dtype=torch.int64)
    torch.distributed.all_to_all_single(sizes, torch.tensor([len(part) for part in parts]), group=group)
    whole = parts[0].new_empty(int(sizes.sum()), *parts[0].shape[1:])
    sent = [len(part) for part in parts]
    torch.distributed.all_to_all_single(whole, torch.cat(parts).contiguous(), sizes.tolist(), sent, group=group)
    return list(whole.split(sizes.tolist()))


class Tokens:
    """What both kinds of buffer do."""

    shuffles = False

    def __init__(self, group: Any) -> None:
        self.group = group
        self.draws = torch.Generator().manual_seed(group.rank())

    def check_rows(self, x: Tensor) -> None:
        assert x.dtype == Settings.FORMAT, x.dtype
        assert x.is_contiguous()
        assert x.shape[1] * x.element_size() % 16 == 0

    def send(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Handle]:
        self.check_rows(x)
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert int(topk_idx.max()) < num_experts if len(topk_idx) else True
        assert num_experts % self.group.size() == 0
        here = num_experts // self.group.size()
        rank_TK = torch.where(topk_idx >= 0, topk_idx // here, -1)
        sent = [(rank_TK == rank).any(1).nonzero()[:, 0] for rank in range(self.group.size())]
        arrived = [all_to_all([t[tokens] for tokens in sent], self.group) for t in (x, topk_idx, topk_weights)]
        received = [len(part) for part in arrived[0]]
        order_S = torch.randperm(sum(received), generator=self.draws) if self.shuffles else torch.arange(sum(received))
        recv_x, recv_idx, recv_weights = (torch.cat(parts)[order_S] for parts in arrived)
        local = recv_idx - self.group.rank() * here
        return (
            recv_x,
            torch.where((recv_idx >= 0) & (local >= 0) & (local < here), local, -1),
            recv_weights,
            Handle(sent, received, order_S, len(x), topk_idx, num_experts),
        )

    def send_again(self, x: Tensor, handle: Handle) -> Tensor:
        self.check_rows(x)
        assert len(x) == handle.tokens
        return torch.cat(all_to_all([x[tokens] for tokens in handle.sent], self.group))[handle.order_S]

    def back(self, rows: Tensor, handle: Handle) -> list[Tensor]:
        """From each process, a row for each token that was sent there."""
        assert len(rows) == len(handle.order_S)
        arrived = torch.empty_like(rows)
        arrived[handle.order_S] = rows
        return all_to_all(list(arrived.split(handle.received)), self.group)

    def add(self, x: Tensor, handle: Handle) -> Tensor:
        self.check_rows(x)
        total = x.new_zeros(handle.tokens, x.shape[1])
        for tokens, rows in zip(handle.sent, self.back(x, handle), strict=True):
            total[tokens] += rows
        return total


def late(values: list[Tensor], asynchronous: bool) -> tuple[list[Tensor], Event]:
    """The tensors that a caller gets, and the event that gives them their values."""
    if not asynchronous:
        return values, Event([])
    empty = [torch.full_like(value, float("nan") if value.is_floating_point() else -7) for value in values]
    return empty, Event(list(zip(empty, values, strict=True)))


class EPBuffer(Tokens):
    """Version 2.5, and the calls of 2.0's ElasticBuffer."""

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        deterministic: bool = False,
    ) -> None:
        super().__init__(group)
        assert num_bytes is None
        assert 0 < num_topk <= 32
        assert hidden % 256 == 0
        Settings.calls.append(f"EPBuffer {num_max_tokens_per_rank} {hidden} {num_topk}")
        self.most, self.hidden, self.top_k, self.shuffles = num_max_tokens_per_rank, hidden, num_topk, not deterministic
        most = [None] * group.size()
        torch.distributed.all_gather_object(most, num_max_tokens_per_rank, group=group)
        assert len(set(most)) == 1, "all the ranks must hold the same value"

    def dispatch(self, x: Tensor, **named: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Handle, Event]:
        given = ElasticDispatch(**named)
        assert len(x) <= self.most
        assert x.shape[1] <= self.hidden
        assert given.num_sms > 0 or given.num_experts is not None  # otherwise `get_theoretical_num_sms(None, ...)` fails
        if given.handle is not None:
            assert given.topk_idx is None
            assert given.topk_weights is None
            (recv_x,), event = late([self.send_again(x, given.handle)], given.async_with_compute_stream)
            return recv_x, None, None, given.handle, event
        assert given.topk_idx is not None
        assert given.topk_weights is not None
        assert given.num_experts is not None
        assert given.topk_idx.shape[1] <= self.top_k
        *values, made = self.send(x, given.topk_idx, given.topk_weights, given.num_experts)
        (recv_x, recv_idx, recv_weights), event = late(values, given.async_with_compute_stream)
        return recv_x, recv_idx, recv_weights, made, event

    def combine(self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None) -> tuple[Tensor, Tensor | None, Event]:
        total = self.add(x, handle)
        if topk_weights is None:
            return total, None, Event([])
        assert topk_weights.dtype == torch.float32
        here = handle.num_experts // self.group.size()
        combined = torch.zeros(handle.topk_idx.shape)
        for rank, (tokens, rows) in enumerate(zip(handle.sent, self.back(topk_weights, handle), strict=True)):
            own = (handle.topk_idx[tokens] >= 0) & (handle.topk_idx[tokens] // here == rank)
            combined[tokens] += torch.where(own, rows, 0.0)
        return total, combined, Event([])


class Config:
    """Sizes of buffers by kind of communication."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer(Tokens):
    """Version 1."""

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        super().__init__(group)
        assert num_nvl_bytes > 0
        assert num_rdma_bytes == 0
        Settings.calls.append(f"Buffer {num_nvl_bytes}")

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, None, Tensor, Tensor, Event]:
        rank_TK = torch.where(topk_idx >= 0, topk_idx // (num_experts // self.group.size()), -1)
        in_rank = torch.stack([(rank_TK == rank).any(1) for rank in range(self.group.size())], 1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, Event([])

    def dispatch(self, x: Tensor, **named: Any) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Handle | None, Event]:
        given = FirstDispatch(**named)
        if given.handle is not None:
            assert given.topk_idx is None
            assert given.topk_weights is None
            (recv_x,), event = late([self.send_again(x, given.handle)], given.async_finish)
            return recv_x, None, None, None, None, event
        assert given.topk_idx is not None
        assert given.topk_weights is not None
        assert given.num_tokens_per_expert is not None
        num_experts = len(given.num_tokens_per_expert)
        per_rank, _, per_expert, in_rank, _ = self.get_dispatch_layout(given.topk_idx, num_experts)
        for got, own in ((given.num_tokens_per_rank, per_rank), (given.num_tokens_per_expert, per_expert), (given.is_token_in_rank, in_rank)):
            assert got is not None
            assert torch.equal(got, own)
        recv_x, recv_idx, recv_weights, made = self.send(x, given.topk_idx, given.topk_weights, num_experts)
        counts = torch.bincount(recv_idx[recv_idx >= 0], minlength=num_experts // self.group.size()).tolist()
        (recv_x, recv_idx, recv_weights), event = late([recv_x, recv_idx, torch.where(recv_idx >= 0, recv_weights, 0.0)], given.async_finish)
        return recv_x, recv_idx, recv_weights, counts, made, event

    def combine(self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None) -> tuple[Tensor, Tensor | None, Event]:
        total = self.add(x, handle)
        if topk_weights is None:
            return total, None, Event([])
        assert topk_weights.dtype == torch.float32
        combined = torch.zeros(handle.topk_idx.shape)
        for tokens, rows in zip(handle.sent, self.back(topk_weights, handle), strict=True):
            combined[tokens] += rows
        return total, combined, Event([])


def install(kind: str, number_format: torch.dtype) -> None:
    """Makes it the package `deep_ep` of this process, in the version that has this kind of buffer."""
    package = types.ModuleType("deep_ep")
    vars(package).update({kind: Buffer if kind == "Buffer" else EPBuffer, "topk_idx_t": torch.int64})
    sys.modules["deep_ep"] = package
    Settings.FORMAT = number_format
