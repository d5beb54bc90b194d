"""Where two implementations of a model begin to differ: the output of every part of both, recorded and compared in order.

Shapes: B batch; S sequence; D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron.model.gpt import GPT

Parts = dict[str, Tensor]
"""Words for a part -> its output BSD in the last forward, in the order of computation."""
LIMIT = 1e-5
"""Difference, relative to the largest number of a part's output, that is no rounding (transformers rounds positions to float32)."""


def our_parts(gpt: GPT) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model of ours."""
    yield "the embedding", gpt.sequential["0"].word_embeddings  # type: ignore[misc]
    for number, layer in enumerate(gpt.layers):
        yield from _of_layer(number, layer, layer.attention, layer.mlp)
    yield "the last norm", gpt.sequential[str(gpt.num_layers + 3)]


def their_parts(model: Any) -> Iterator[tuple[str, nn.Module | None]]:
    """The same parts of a model of transformers'; those that are not found are left out."""
    base = model.base_model
    yield "the embedding", model.get_input_embeddings()
    for number, layer in enumerate(getattr(base, "layers", ())):
        attention = getattr(layer, "self_attn", None) or getattr(layer, "attention", None)
        yield from _of_layer(number, layer, attention, getattr(layer, "mlp", None))
    yield "the last norm", getattr(base, "norm", None) or getattr(base, "final_layer_norm", None)


def _of_layer(number: int, layer: Any, attention: Any, mlp: Any) -> Iterator[tuple[str, Any]]:
    yield f"layer {number}'s attention", attention
    yield f"layer {number}'s MLP or experts", mlp
    yield f"layer {number}", layer


@contextmanager
def recorded(modules: Iterable[tuple[str, nn.Module | None]], parts: Parts) -> Iterator[None]:
    """What each of the modules gives in the last forward inside the context goes into `parts`."""

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            parts.pop(name, None)  # so that the order is that of the last forward
            parts[name] = _hidden(output).detach()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules if isinstance(module, nn.Module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(output: Any) -> Tensor:
    """The hidden states in what a part returns."""
    for name in ("hidden_BSD", "y_BSD", "last_hidden_state"):
        output = getattr(output, name, output)
    while isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, Tensor)
    return output


def first_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    """The first part whose outputs differ. None: all that both have are equal, so that the head is what is left."""
    for name, first in ours.items():
        if name in theirs:
            second = theirs[name].reshape(first.shape) if theirs[name].numel() == first.numel() else theirs[name]
            if second.shape != first.shape or not _close(first.double(), second.double()):
                return name
    return None


def _close(first: Tensor, second: Tensor) -> bool:
    """False also for what is no number."""
    return bool((first - second).abs().max() <= LIMIT * torch.maximum(first.abs().max(), second.abs().max()))
