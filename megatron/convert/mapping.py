"""The engine: how one of our weights becomes weights of another program, and back.

A table for an architecture is a list of entries. Each names one weight of ours, the weights there that hold the same numbers, and the form that
leads from one to the other. Conversion runs over the entries one at a time, in either direction, so that it never holds more than one of them.

Shapes: E experts; F hidden width; D model width; H query heads; K key/value heads; d head dimension. Ours are GPT-NeoX's: query_key_value rows lie
head by head as (q, k, v) where H = K, else all queries, all keys, all values; a gated linear1 is [up ; gate]; experts' matrices are [E*F, D].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron.convert.errors import ConversionError

Read = Callable[[str], Tensor]
"""Gives a weight by its name; raises ConversionError where it is not there."""


class Misfit(ValueError):
    """Numbers that the other program cannot keep. The message continues after the weight's name."""


class Form(Protocol):
    """A change of shape that loses nothing: `back(there(x)) == x`."""

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """Our weight as the weights of the entry's `theirs`, in their order."""
        ...

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """Their weights as ours. Raises Misfit where they hold something that ours cannot."""
        ...


class Same:
    """One weight, unchanged."""

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """The weight."""
        return (ours,)

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """The weight."""
        return theirs[0]


class Reshaped:
    """The same numbers in another shape."""

    def __init__(self, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
        self.ours, self.theirs = ours, theirs

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """In their shape."""
        return (ours.reshape(self.theirs),)

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """In ours."""
        return theirs[0].reshape(self.ours)


class Rows:
    """Matrices that ours stacks: `sizes` rows of each, `order[i]` the place in ours of their i-th."""

    def __init__(self, sizes: Sequence[int], order: Sequence[int] | None = None) -> None:
        self.sizes = list(sizes)
        self.order = list(order if order is not None else range(len(self.sizes)))

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """The matrices."""
        parts = ours.split(self.sizes)
        return [parts[place] for place in self.order]

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """Stacked."""
        parts = [theirs[self.order.index(place)] for place in range(len(self.sizes))]
        return torch.cat(parts)


class HeadByHead:
    """Queries, keys and values, [H*d, ...] each, from rows that lie head by head as (q, k, v)."""

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """(query, key, value)."""
        return [part.flatten(0, 1) for part in ours.unflatten(0, (self.heads, 3, -1)).unbind(1)]

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """Head by head."""
        return torch.stack([part.unflatten(0, (self.heads, -1)) for part in theirs], 1).flatten(0, 2)


class PerExpert:
    """[E*F, D] as E matrices [F, D], or [D, F] where `transposed`."""

    def __init__(self, experts: int, *, transposed: bool = False) -> None:
        self.experts, self.transposed = experts, transposed

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """A matrix for each expert."""
        return [part.t() if self.transposed else part for part in ours.chunk(self.experts)]

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """Stacked."""
        return torch.cat([part.t() if self.transposed else part for part in theirs])


class Zero:
    """A weight of ours that does not exist there: it has to be zero. `size`: its entries."""

    def __init__(self, size: int) -> None:
        self.size = size

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """Nothing. Raises Misfit where numbers would be lost."""
        if bool(ours.any()):
            raise Misfit("is not zero, but the other architecture has no such weight")
        return ()

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """Zeros."""
        return torch.zeros(self.size)


class Constant:
    """A weight that only they have, or that here takes no part: `size` entries of `value`, wherever it is made."""

    def __init__(self, size: int, value: float, *, unused: bool = False) -> None:
        self.size, self.value, self.unused = size, value, unused

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """The constant; nothing of a weight that takes no part."""
        return () if self.unused else (self._made(),)

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """The constant. Raises Misfit where theirs is something else, since ours has no place for it."""
        if any(bool((tensor != self.value).any()) for tensor in theirs):
            raise Misfit(f"must be {self.value:g} everywhere, because this model has no such weight")
        return self._made()

    def _made(self) -> Tensor:
        return torch.full((self.size,), self.value)


class Repeated:
    """One weight of ours that is there `count` times."""

    def __init__(self, count: int) -> None:
        self.count = count

    def there(self, ours: Tensor) -> Sequence[Tensor]:
        """The weight, `count` times."""
        return [ours] * self.count

    def back(self, theirs: Sequence[Tensor]) -> Tensor:
        """The weight. Raises Misfit where the copies differ."""
        if any(not torch.equal(theirs[0], other) for other in theirs[1:]):
            raise Misfit("must be equal, because this model has one weight for them")
        return theirs[0]


@dataclass(frozen=True)
class Entry:
    """One of our weights, where it is there, and how it gets there."""

    ours: str | None
    """None: a weight that only they have."""
    theirs: tuple[str, ...]
    form: Form = Same()  # noqa: RUF009 -- it has no state
    exact: bool = False
    """Kept in float32 whatever precision the rest is written in."""


Table = Sequence[Entry]
_NOTHING = torch.empty(0)


class Named(NamedTuple):
    """A converted weight."""

    name: str
    tensor: Tensor
    exact: bool


def to_theirs(table: Iterable[Entry], read: Read) -> Iterator[Named]:
    """Their weights, an entry at a time. Raises ConversionError."""
    for entry in table:
        try:
            tensors = entry.form.there(_NOTHING if entry.ours is None else read(entry.ours))
        except Misfit as error:
            raise ConversionError(f"{entry.ours} {error}.") from error
        for name, tensor in zip(entry.theirs, tensors, strict=True):
            yield Named(name, tensor, entry.exact)


def to_ours(table: Iterable[Entry], read: Read) -> Iterator[Named]:
    """Our weights, an entry at a time. Raises ConversionError."""
    for entry in table:
        parts = [read(name) for name in entry.theirs]
        try:
            tensor = entry.form.back(parts)
        except RuntimeError as error:
            shapes = " and ".join(str(list(part.shape)) for part in parts)
            raise ConversionError(f"{' and '.join(entry.theirs)} of shape {shapes} cannot become {entry.ours}.") from error
        except Misfit as error:
            raise ConversionError(f"{' and '.join(entry.theirs)} {error}.") from error
        if entry.ours is not None:
            yield Named(entry.ours, tensor, entry.exact)


def check_complete(table: Table, ours: Mapping[str, object] | set[str]) -> None:
    """Raises ConversionError unless the table maps each of our weights, and only these, exactly once, and names none of theirs twice."""
    for kind, names in (
        ("ours", [entry.ours for entry in table if entry.ours is not None]),
        ("theirs", [name for entry in table for name in entry.theirs]),
    ):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ConversionError(f"{twice[0]} ({kind}) is in the table of the architecture twice.")
    mapped = {entry.ours for entry in table if entry.ours is not None}
    if missing := sorted(set(ours) - mapped):
        raise ConversionError(
            f"{missing[0]} is in the checkpoint, but not in the model that the configuration describes ({len(missing)} such weights). "
            "Give the configuration of this checkpoint."
        )
    if extra := sorted(mapped - set(ours)):
        raise ConversionError(
            f"{extra[0]} is in the model that the configuration describes, but not in the checkpoint ({len(extra)} such weights). Give "
            "the configuration of this checkpoint."
        )
