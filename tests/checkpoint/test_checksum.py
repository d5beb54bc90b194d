"""Checksums that do not depend on the division of a tensor, and copies between two divisions."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron.checkpoint.checksum import MODULUS, checksum
from megatron.checkpoint.parts import copy_part, count_within, overlaps
from megatron.model.division import Cut, Span, whole_cut

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)


def whole_sum(tensor: Tensor) -> int:
    return checksum(whole_cut(tensor.shape), 0, tensor)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).mul(100).to(dtype)


def cuts_of(tensor: Tensor, dim: int) -> list[Cut]:
    """Three processes' parts along one dimension: the second holds two spans, the third one place more that it does not count for."""
    size = tensor.shape[dim]
    spans = [(Span(1, 2),), (Span(0, 1), Span(2, 3)), (Span(3, size), Span(0, 1, owned=False))]
    every = whole_cut(tensor.shape).spans
    return [Cut(tuple(tensor.shape), (*every[:dim], own, *every[dim + 1 :])) for own in spans]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", range(3))
def test_the_sums_of_parts_add_up(dtype: torch.dtype, dim: int) -> None:
    tensor = numbers(6, 5, 7, dtype=dtype)
    parts = [checksum(cut, 0, cut.take(tensor)) for cut in cuts_of(tensor, dim)]
    assert sum(parts) % MODULUS == whole_sum(tensor)


@pytest.mark.parametrize("shape", [(6, 5, 7), (210,), (1, 210), (210, 1)])
def test_the_sums_of_runs_add_up(shape: tuple[int, ...]) -> None:
    tensor, generator = numbers(*shape), random.Random(1)
    for _ in range(20):
        borders = [0, *sorted(generator.sample(range(1, 210), 4)), 210]
        runs = [checksum(whole_cut(shape), start, tensor.view(-1)[start:stop]) for start, stop in pairwise(borders)]
        assert sum(runs) % MODULUS == whole_sum(tensor)


def test_runs_of_a_part_add_up() -> None:
    tensor = numbers(6, 5, 7)
    total = 0
    for cut in cuts_of(tensor, 1):
        flat = cut.take(tensor).reshape(-1)
        total += checksum(cut, 0, flat[:11]) + checksum(cut, 11, flat[11:])
    assert total % MODULUS == whole_sum(tensor)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(0),
        lambda x: x.transpose(0, 1).contiguous(),
        lambda x: x.roll(1, 1),
        lambda x: x[[1, 0, *range(2, 8)]],
        lambda x: -x,
        lambda x: torch.nextafter(x, torch.tensor(torch.inf)),
        lambda x: torch.zeros_like(x),
        lambda x: torch.cat([x[:4], x[:4]]),
    ],
)
def test_a_change_changes_the_sum(change: object) -> None:
    assert callable(change)
    tensor = numbers(8, 8)
    assert whole_sum(change(tensor)) != whole_sum(tensor)


def test_one_number_changes_the_sum() -> None:
    tensor = numbers(3, 4)
    for place in range(12):
        other = tensor.clone()
        other.view(-1)[place] += 1e-3
        assert whole_sum(other) != whole_sum(tensor)


def test_a_number_and_nothing() -> None:
    assert whole_sum(torch.tensor(3)) == 3 * whole_sum(torch.tensor(1)) % MODULUS != 0
    assert whole_sum(torch.zeros(0, 5)) == whole_sum(torch.zeros(4, 0)) == 0


@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("other", range(3))
def test_parts_are_copied_from_the_parts_of_another_division(dim: int, other: int) -> None:
    tensor = numbers(6, 5, 7)
    for target_cut in cuts_of(tensor, dim):
        target, copied = torch.zeros(target_cut.local_shape), 0
        for cut in cuts_of(tensor, other):
            copied += copy_part(target, target_cut, cut.take(tensor), cut)
        assert torch.equal(target, target_cut.take(tensor))
        assert copied == target.numel() == count_within(target_cut, tensor.shape)


def test_rows_that_only_one_division_has() -> None:
    tensor = numbers(4, 3)
    cut = Cut((6, 3), ((Span(3, 6),), (Span(0, 3),)))
    target = torch.zeros(3, 3)
    assert copy_part(target, cut, tensor, whole_cut(tensor.shape)) == count_within(cut, tensor.shape) == 3
    assert torch.equal(target, torch.cat([tensor[3:], torch.zeros(2, 3)]))
    assert not list(overlaps(cut, whole_cut((3, 3))))
