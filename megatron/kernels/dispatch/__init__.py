"""Rows to the processes that hold their experts, and back. This is the list of the ways; the interface is `model.moe.dispatch.transport.Transport`.

What communicates stands right of this folder, so an implementation is given as "package.module:Class", and imported when a model first sends rows.
The reference sends each choice of an expert as a row of its own, over `torch.distributed`. Another way runs where the configuration names it.
"""

from __future__ import annotations

from megatron.kernels.dispatch import deep_ep
from megatron.kernels.registry import Implementation, Op

OP: Op[str] = Op("dispatch")
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, lambda: "megatron.model.moe.dispatch.transport:ExchangeTransport"))
OP.register(  # by name only
    Implementation("deep_ep", frozenset({"cuda"}), deep_ep.unavailable, lambda: "megatron.model.moe.dispatch.deep_ep:DeepEPTransport")
)
