"""What a conversion leaves out is compared with what stands for it: buffers with what the configuration gives, a tied head with the embedding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.convert.architecture import Architecture, Source
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import Entry
from megatron.model.positions.rope_scaling import rotary_frequencies
from megatron.model.positions.rotary import inverse_frequencies

BUFFER = re.compile(r"\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$")
"""What older versions of transformers stored beside the weights."""
TOLERANCE = {torch.float16: (2e-3, 1e-7), torch.bfloat16: (1e-2, 0.0)}
"""Number format -> (relative, absolute) error of a stored buffer; of others FINE."""
FINE = (1e-4, 1e-8)


class Weights(Protocol):
    """Weights by name, of one folder."""

    @property
    def directory(self) -> Any:
        """The folder."""
        ...

    @property
    def names(self) -> list[str]:
        """All of them."""
        ...

    def read(self, name: str) -> Tensor:
        """One."""
        ...


def untied_head(architecture: Architecture, source: Source, stored: Weights) -> str | None:
    """The head's name there where the model says that it is the embedding, and the weights say otherwise. None: they do not.

    transformers then keeps the two apart, too.
    """
    if source.config.model.no_weight_tying or (head := head_name(architecture, source)) not in stored.names:
        return None
    embedding = next(entry.theirs[0] for entry in architecture.table(source) if entry.ours == "sequential.0.word_embeddings.weight")
    if embedding not in stored.names:
        return None
    first, second = stored.read(embedding), stored.read(head)
    return None if first.shape == second.shape and torch.equal(first, second) else head


def head_name(architecture: Architecture, source: Source) -> str:
    """What their weight of an output layer of its own is called."""
    model = source.config.model.model_copy(update={"no_weight_tying": True})
    untied = Source(source.config.model_copy(update={"model": model}), source.vocabulary)
    ours = f"sequential.{model.num_layers + 4}.final_linear.weight"
    return next(entry.theirs[0] for entry in architecture.table(untied) if entry.ours == ours)


def check_used(table: list[Entry], stored: Weights, source: Source, *, tied: str | None, later: Iterable[str]) -> None:
    """`tied`: a copy of the embedding, which may be there; None: the head is a weight of its own. `later`: weights that are left out knowingly.

    Raises ConversionError for a weight that no entry reads, and for a buffer that holds something else than the configuration gives.
    """
    read = {name for entry in table for name in entry.theirs} | set(later)
    left = [name for name in stored.names if name not in read and name != tied]
    if unknown := [name for name in left if not BUFFER.search(name)]:
        raise ConversionError(f"{stored.directory} holds {unknown[0]}, but this model has no such weight ({len(unknown)} weights of this kind).")
    for name in left:
        check_buffer(name, stored.read(name), source.config.model, stored.directory)


def check_buffer(name: str, tensor: Tensor, model: ModelConfig, directory: Any) -> None:
    """Raises ConversionError for a buffer that is not what the configuration gives."""
    if name.endswith("inv_freq"):
        possible = list(possible_frequencies(model))
        rtol, atol = TOLERANCE.get(tensor.dtype, FINE)
        fits = any(
            len(given) == tensor.numel() and torch.allclose(tensor.double().flatten(), torch.tensor(given).double(), rtol=rtol, atol=atol)
            for given in possible
        )
        if not fits:
            raise ConversionError(
                f"{directory}: {name} holds other frequencies than config.json gives (rope_theta and the share of rotated dimensions) "
                f"({_first(tensor.flatten().tolist())} instead of {_first(possible[-1])}). The weights were trained with other settings; "
                "correct config.json."
            )
    elif name.endswith("attention.bias"):
        mask = tensor.reshape(tensor.shape[-2:]).bool() if tensor.ndim >= 2 else tensor
        if mask.ndim != 2 or not torch.equal(mask, torch.ones_like(mask).tril()):
            raise ConversionError(
                f"{directory}: {name} must be the mask with which each token sees itself and the tokens before it; this model has no other mask."
            )
    elif tensor.numel() != 1 or not bool(tensor.float() <= -1e3):
        raise ConversionError(f"{directory}: {name} must be one large negative number; this model cannot keep another value.")


def possible_frequencies(model: ModelConfig) -> Iterator[list[float]]:
    """What a stored `inv_freq` may hold: the plain frequencies, and those after rope_scaling."""
    yield inverse_frequencies(model.rotary_dim, model.rotary_emb_base)
    yield list(rotary_frequencies(model))


def _first(numbers: list[float]) -> str:
    return "[" + ", ".join(f"{number:.3g}" for number in numbers[:4]) + (", ...]" if len(numbers) > 4 else "]")


# ---------------------------------------------------------------- numbers that are not finite


def finite(name: str, stored: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`. Raises ConversionError where it holds numbers that are not finite: they were so, or too large for the number format."""
    if rounded.isfinite().all():
        return rounded
    if count := int((~stored.isfinite()).sum()):
        raise ConversionError(f"{name} holds {count} numbers that are NaN or infinite: the weights are damaged. Copy or download them again.")
    count, largest = int((~rounded.isfinite()).sum()), stored.abs().max().item()
    kind = str(rounded.dtype).removeprefix("torch.")
    raise ConversionError(
        f"{count} numbers of {name} are too large for {kind}: the largest is {largest:.4g}, and the largest {kind} number is "
        f"{torch.finfo(rounded.dtype).max:.4g}. "
        "Choose --precision bf16 or fp32."
    )
