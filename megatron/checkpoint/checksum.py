"""A checksum of a tensor that does not depend on how its elements are divided among processes.

    sum over the elements of (bits of the element) x u(row) x v(column), modulo 2**64

A row is a place in all dimensions but the last, a column one in the last dimension, both counted in the whole tensor. u and v are odd numbers that
a hash of the place gives, so that elements in the wrong place change the sum. Sums over parts add up to the sum over the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.model.division import Cut, Span

Integers = npt.NDArray[np.int64]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer format of as many bytes as the elements have."""
ROW, COLUMN = 1, 2
MODULUS = 1 << 64


def checksum(cut: Cut, start: int, values: Tensor) -> int:
    """The sum over the elements of a process's tensor that it counts for (`Span.owned`), from 0 to 2**64 - 1.

    `cut`: the part of the whole weight that the process's tensor is. `values`: its elements from place `start` of the flattened tensor on.
    """
    *leading, columns = cut.spans or ((Span(0, 1),),)
    column_factor = _factors(_places(columns), COLUMN, _owned(columns))
    row_factor = _factors(_row_numbers(leading, cut.shape[:-1]), ROW, _row_owned(leading))
    flat = values.detach().reshape(-1).cpu()
    bits: Integers = flat.view(BITS[flat.element_size()]).numpy()
    total = 0
    with np.errstate(over="ignore"):  # modulo 2**64
        for rows, width, begin in _blocks(start, len(bits), len(column_factor)):
            block = bits[begin : begin + (rows.stop - rows.start) * (width.stop - width.start)].reshape(rows.stop - rows.start, -1)
            sums = np.einsum("rc,c->r", block, column_factor[width])
            total += int(np.dot(sums, row_factor[rows]))
    return total % MODULUS


def hexadecimal(value: int) -> str:
    """As a manifest holds it."""
    return f"{value:016x}"


def _blocks(start: int, count: int, columns: int) -> Iterator[tuple[slice, slice, int]]:
    """A run of elements as rectangles: rows, columns, and where the rectangle begins in the run."""
    place = 0
    while place < count:
        row, column = divmod(start + place, columns)
        rows = (count - place) // columns if column == 0 else 0
        width = columns - column if rows else min(columns - column, count - place)
        yield slice(row, row + max(1, rows)), slice(column, column + width), place
        place += max(1, rows) * width


def _places(spans: Sequence[Span]) -> Integers:
    return np.concatenate([np.arange(span.start, span.stop, dtype=np.int64) for span in spans]) if spans else np.zeros(0, np.int64)


def _owned(spans: Sequence[Span]) -> Integers:
    return np.concatenate([np.full(span.stop - span.start, span.owned, np.int64) for span in spans]) if spans else np.zeros(0, np.int64)


def _row_numbers(leading: Sequence[Sequence[Span]], shape: Sequence[int]) -> Integers:
    numbers = np.zeros(1, np.int64)
    for spans, size in zip(leading, shape, strict=True):
        numbers = (numbers[:, None] * size + _places(spans)[None, :]).reshape(-1)
    return numbers


def _row_owned(leading: Sequence[Sequence[Span]]) -> Integers:
    owned = np.ones(1, np.int64)
    for spans in leading:
        owned = (owned[:, None] * _owned(spans)[None, :]).reshape(-1)
    return owned


def _factors(places: Integers, kind: int, owned: Integers) -> Integers:
    """Odd numbers from a hash of the places (Steele, Lea and Flood, 2014: SplitMix); 0 where another process counts."""
    with np.errstate(over="ignore"):
        mixed = (places.astype(np.uint64) * np.uint64(2) + np.uint64(kind)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (mixed | np.uint64(1)).view(np.int64) * owned
