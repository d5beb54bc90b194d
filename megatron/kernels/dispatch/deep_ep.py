"""The package DeepEP (deepseek-ai/DeepEP): its buffers behind one interface, for every version that trains, and the gradients.

Shapes: T tokens of this process; S tokens that it receives, one for each process and token however many of its experts here were chosen; K experts
per token; D model width.

Versions. 1.x has `Buffer`, 2.0 `ElasticBuffer` beside it, and 2.5 `EPBuffer` alone; the last two are called in the same way. Each of them sums
results over processes without weights (`combine`). The gradient of a dispatch is a combine, and that of a combine is a dispatch with the same handle.

What it needs: bfloat16, float32 weights, a hidden size that 256 divides, at most 32 experts per token, and GPUs that reach each other over NVLink, or
over RDMA between machines. Tokens arrive in the order of (process, token): version 1 does so always, the others where they are `deterministic`.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron.kernels.registry import KernelUnavailable

CAPABILITY = (9, 0)
"""The oldest GPUs that the package is documented for."""


def unavailable() -> str | None:
    """Why the package cannot run. None: it can, as far as is known before a buffer is opened."""
    if find_spec("deep_ep") is None:
        return "the package deep_ep is not installed; its page github.com/deepseek-ai/DeepEP says how to build it"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        return f"deep_ep needs GPUs of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer, and this one has {major}.{minor}"
    return None


class Sizes(NamedTuple):
    """What a buffer is made for."""

    hidden: int
    top_k: int
    tokens: int
    """The most tokens of a process, the same number on all."""


class Sent(NamedTuple):
    """A dispatch on its way. The tensors have values after `event.current_stream_wait()`."""

    x_SD: Tensor
    expert_SK: Tensor
    """Number of the expert on this process, or -1 for an expert of another process."""
    weight_SK: Tensor
    handle: Any
    event: Any


class TokenBuffer(Protocol):
    """What is asked of a buffer. No method records gradients. Every method is collective."""

    def dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Sent:
        """Starts it. Empty choices are -1."""
        ...

    def dispatch_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        """x_SD: other values, sent as in an earlier dispatch."""
        ...

    def combine(self, y_SD: Tensor, weight_SK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        """(y_TD, weight_TK), each summed over the processes that received the token; None where no weights are given."""
        ...


class ElasticTokens:
    """`EPBuffer` or `ElasticBuffer`."""

    def __init__(self, kind: Any, group: Any, sizes: Sizes) -> None:
        self.buffer = kind(group, num_max_tokens_per_rank=sizes.tokens, hidden=sizes.hidden, num_topk=sizes.top_k, deterministic=True)

    def dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Sent:
        """As `TokenBuffer` says."""
        given = {"topk_idx": expert_TK, "topk_weights": weight_TK, "num_experts": num_experts}
        return Sent(*self.buffer.dispatch(x_TD, **given, async_with_compute_stream=True))

    def dispatch_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        """As `TokenBuffer` says. The number of SMs is given: otherwise the package asks for the number of experts before it reads the handle."""
        x_SD: Tensor = self.buffer.dispatch(x_TD, handle=handle, num_sms=handle.num_sms)[0]
        return x_SD

    def combine(self, y_SD: Tensor, weight_SK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        """As `TokenBuffer` says."""
        y_TD, weight_TK, _ = self.buffer.combine(y_SD, handle=handle, topk_weights=weight_SK)
        return y_TD, weight_TK


class FirstTokens:
    """`Buffer`, of version 1."""

    def __init__(self, kind: Any, group: Any, sizes: Sizes) -> None:
        hints = [config(group.size()) for config in (kind.get_dispatch_config, kind.get_combine_config)]
        row = sizes.hidden * 2, group.size()
        self.buffer = kind(group, max(h.get_nvl_buffer_size_hint(*row) for h in hints), max(h.get_rdma_buffer_size_hint(*row) for h in hints))

    def dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Sent:
        """As `TokenBuffer` says."""
        per_rank, per_rdma_rank, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(expert_TK, num_experts)
        layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_rdma_rank": per_rdma_rank, "num_tokens_per_expert": per_expert}
        x_SD, expert_SK, weight_SK, _, handle, event = self.buffer.dispatch(
            x_TD, topk_idx=expert_TK, topk_weights=weight_TK, is_token_in_rank=in_rank, **layout, async_finish=True
        )
        return Sent(x_SD, expert_SK, weight_SK, handle, event)

    def dispatch_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        """As `TokenBuffer` says."""
        x_SD: Tensor = self.buffer.dispatch(x_TD, handle=handle)[0]
        return x_SD

    def combine(self, y_SD: Tensor, weight_SK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        """As `TokenBuffer` says."""
        y_TD, weight_TK, _ = self.buffer.combine(y_SD, handle, topk_weights=weight_SK)
        return y_TD, weight_TK


def open_buffer(group: Any, sizes: Sizes) -> TokenBuffer:
    """The newest kind of buffer that the installed version has. Collective. Raises KernelUnavailable with the package's reason."""
    package = importlib.import_module("deep_ep")
    try:
        for name in ("EPBuffer", "ElasticBuffer"):
            if (kind := getattr(package, name, None)) is not None:
                return ElasticTokens(kind, group, sizes)
        if (kind := getattr(package, "Buffer", None)) is not None:
            return FirstTokens(kind, group, sizes)
    except (AssertionError, RuntimeError) as error:  # its checks of NVLink, RDMA, NCCL and numbers of processes
        reason = f"deep_ep cannot open a buffer for {group.size()} processes ({error or type(error).__name__})"
        raise KernelUnavailable(f"dispatch: {reason}; remove dispatch from kernel_backends") from error
    raise KernelUnavailable("dispatch: the installed deep_ep has none of EPBuffer, ElasticBuffer and Buffer; remove dispatch from kernel_backends")


class SharedBuffer:
    """The one buffer that all layers of a process use, because nothing stays in it after a call. It is opened when it is first used and grows."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self._buffer: TokenBuffer | None = None
        self._sizes = Sizes(0, 0, 0)

    def of(self, sizes: Sizes) -> TokenBuffer:
        """One that is large enough. Collective: all processes ask with the same numbers."""
        needed = Sizes(*map(max, sizes._replace(tokens=_power_of_two(sizes.tokens)), self._sizes))
        if self._buffer is None or needed != self._sizes:
            self._buffer, self._sizes = open_buffer(self.group, needed), needed
        return self._buffer


@cache
def shared_buffer(group: Any) -> SharedBuffer:
    """The buffer of a process group of `torch.distributed`."""
    return SharedBuffer(group)


def launch(buffer: TokenBuffer, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, *, num_experts: int) -> Sent:
    """Starts a dispatch, without a gradient: give it to `land`."""
    kind = getattr(importlib.import_module("deep_ep"), "topk_idx_t", torch.int64)
    with torch.no_grad():
        return buffer.dispatch(x_TD.detach().contiguous(), expert_TK.to(kind).contiguous(), weight_TK.detach().contiguous(), num_experts)


def land(buffer: TokenBuffer, x_TD: Tensor, weight_TK: Tensor, sent: Sent) -> tuple[Tensor, Tensor]:
    """(x_SD, weight_SK): waits for the tokens; the gradients of what was launched go back to `x_TD` and `weight_TK`."""
    sent.event.current_stream_wait()
    x_SD, weight_SK = _Land.apply(x_TD, weight_TK, sent, buffer)
    return x_SD, weight_SK


def send_back(buffer: TokenBuffer, y_SD: Tensor, handle: Any) -> Tensor:
    """y_TD: each token's sum over the processes that received it."""
    y_TD: Tensor = _SendBack.apply(y_SD, handle, buffer)
    return y_TD


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, sent: Sent, buffer: TokenBuffer) -> tuple[Tensor, Tensor]:
        ctx.buffer, ctx.handle = buffer, sent.handle
        return sent.x_SD, sent.weight_SK

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor, grad_SK: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, grad_TK = ctx.buffer.combine(grad_SD.contiguous(), grad_SK.contiguous(), ctx.handle)
        return grad_TD, grad_TK, None, None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, handle: Any, buffer: TokenBuffer) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(y_SD.contiguous(), None, handle)[0]

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.buffer.dispatch_again(grad_TD.contiguous(), ctx.handle), None, None


def _power_of_two(number: int) -> int:
    """The next one, so that growing lengths open few buffers."""
    return 1 << max(0, number - 1).bit_length()
