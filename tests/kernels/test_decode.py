"""Decoding's compiled parts against their definitions (`megatron/kernels/decode`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.attention.interface import HeadLayout
from megatron.kernels.compiled import load
from megatron.kernels.decode import reference
from megatron.kernels.decode.interface import Attention, Choice, Experts, Input, Linear, Lores, Matrix, Projection, Routed
from megatron.kernels.decode.quantize import quantize_rows

pytestmark = pytest.mark.skipif(load()[0] is None, reason=f"the compiled kernels cannot be used: {load()[1]}")
compiled = pytest.importorskip("megatron.kernels.decode.compiled")
THREADS = (1, 2, 3)
FORMATS = ("float32", "bfloat16", "int8")
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Drawn:
    """Random numbers of one seed, and matrices of one format."""

    format: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(0))

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)  # type: ignore[attr-defined]

    def matrix(self, rows: int, columns: int, format: str | None = None) -> Matrix:
        weight = self.numbers(rows, columns) / columns**0.5
        return quantize_rows(weight) if (format or self.format) == "int8" else Matrix(weight.to(getattr(torch, format or self.format)))


def near(got: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * max(1.0, wanted.abs().max().item()))


INPUTS: dict[str, Callable[[Drawn, int], Input]] = {
    "none": lambda drawn, width: Input(),
    "rmsnorm": lambda drawn, width: Input("rmsnorm", drawn.numbers(width), None, 1e-5),
    "layernorm": lambda drawn, width: Input("layernorm", drawn.numbers(width), drawn.numbers(width), 1e-5),
    "plain layernorm": lambda drawn, width: Input("layernorm", None, None, 1e-5),
    "gelu": lambda drawn, width: Input("activation", activation="gelu"),
    "swiglu": lambda drawn, width: Input("gate", activation="silu"),
}


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_linear(format: str, kind: str, rows: int) -> None:
    for columns, height in ((1, 1), (7, 5), (16, 16), (37, 129), (128, 70)):
        drawn = Drawn(format)
        part = Linear(drawn.matrix(height, columns), drawn.numbers(height), INPUTS[kind](drawn, columns))
        x = drawn.numbers(rows, columns * (2 if part.input.kind == "gate" else 1))
        wanted = reference.linear(part, x)
        for threads in THREADS:
            y = torch.full((rows, height), 3.0)
            compiled.Linear(part)(x, y, threads)
            near(y, wanted)
            compiled.Linear(part)(x, y, threads, add=True)
            near(y, 2 * wanted)


def plain(drawn: Drawn, *, gated: bool = False, bias: bool = False, lores: str = "", rank: int = 0, choice: Choice | None = None) -> Experts:
    """An expert layer of 5 experts. `lores`: which projections have them, and whether they are routed."""
    experts, width, hidden, per_expert, lore_rank = 5, 36, 70, 3, 6

    def projection(kind: str) -> Projection:
        biases = drawn.numbers(experts, width if kind == "down" else hidden) if bias else None
        if rank:
            shape, left = ((experts * hidden, rank), (experts * rank, width))
            return Projection(drawn.matrix(*shape), biases, left=drawn.matrix(*left))
        factors = (None, None)
        if kind in lores:
            count = experts * lore_rank * (1 if "always" in lores else per_expert)
            factors = (drawn.matrix(count, width), drawn.matrix(count, hidden))
        return Projection(drawn.matrix(experts * hidden, width), biases, None, *factors)

    routed = Lores(lore_rank, Choice(per_expert, 2), drawn.matrix(experts * per_expert, width))
    return Experts(
        INPUTS["rmsnorm"](drawn, width),
        choice or Choice(experts, 2, normalize=True),
        drawn.matrix(experts, width, "float32"),
        experts,
        projection("up"),
        projection("gate") if gated else None,
        projection("down"),
        "silu" if gated else "gelu",
        rank,
        None if not lores else Lores(lore_rank, Choice(1, 1), None) if "always" in lores else routed,
    )


LAYERS: dict[str, Callable[[Drawn], Experts]] = {
    "plain": lambda drawn: plain(drawn),
    "gated with biases": lambda drawn: plain(drawn, gated=True, bias=True),
    "one expert of a sigmoid": lambda drawn: plain(drawn, choice=Choice(5, 1, sigmoid=True)),
    "scores with a bias": lambda drawn: plain(drawn, choice=Choice(5, 3, sigmoid=True, normalize=True, scale=2.5, bias=drawn.numbers(5))),
    "all experts": lambda drawn: plain(drawn, choice=Choice(5, 5)),
    "LoREs": lambda drawn: plain(drawn, lores="up"),
    "LoREs on the gate": lambda drawn: plain(drawn, gated=True, lores="gate", bias=True),
    "LoREs on both": lambda drawn: plain(drawn, gated=True, lores="up gate"),
    "LoREs that are always on": lambda drawn: plain(drawn, lores="up always"),
    "decomposed": lambda drawn: plain(drawn, rank=9, bias=True),
    "decomposed and gated": lambda drawn: plain(drawn, gated=True, rank=16),
}


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("format", FORMATS)
def test_experts(format: str, layer: str, rows: int) -> None:
    drawn = Drawn(format)
    part = LAYERS[layer](drawn)
    x, residual = drawn.numbers(rows, 36), drawn.numbers(rows, 36)
    wanted = Routed.empty(part, rows)
    reference.route(part, x, wanted)
    wanted_y = residual + reference.experts(part, x, wanted)
    for threads in THREADS:
        got, y = Routed.empty(part, rows), torch.empty_like(x)
        compiled.Experts(part)(x, residual, y, got, threads)
        assert got.expert_Nk.equal(wanted.expert_Nk)
        assert got.lore_NkL.equal(wanted.lore_NkL)
        near(got.weight_Nk, wanted.weight_Nk)
        near(y, wanted_y)


@pytest.mark.parametrize("layer", LAYERS)
def test_experts_give_the_same_bits_wherever_they_lie(layer: str) -> None:
    """What offloading rests on: slots in place of numbers."""
    drawn = Drawn("bfloat16")
    part = LAYERS[layer](drawn)
    order = torch.tensor([3, 0, 4, 1, 2])
    slot_E = order.argsort()

    def moved(stacked: Tensor | None) -> Tensor | None:
        return None if stacked is None else stacked.view(5, -1, stacked.shape[-1])[order].reshape(stacked.shape).contiguous()

    def elsewhere(given: Projection | None) -> Projection | None:
        if given is None:
            return None
        matrices = (None if m is None else Matrix(moved(m.weight)) for m in (given.matrix, given.left, given.lore_a, given.lore_b))  # type: ignore[arg-type]
        matrix, left, a, b = matrices
        return Projection(matrix, moved(given.bias), left, a, b)  # type: ignore[arg-type]

    lores = part.lores
    if lores is not None and lores.router is not None:
        lores = lores._replace(router=Matrix(moved(lores.router.weight)))  # type: ignore[arg-type]
    there = part._replace(up=elsewhere(part.up), gate=elsewhere(part.gate), down=elsewhere(part.down), lores=lores)
    x, routed = drawn.numbers(4, 36), Routed.empty(part, 4)
    compiled.Experts(part).route(x, routed, 2)
    results = [torch.empty_like(x) for _ in range(2)]
    compiled.Experts(part).compute(x, x, results[0], routed, 2)
    compiled.Experts(there).compute(x, x, results[1], routed, 2, slot_Nk=slot_E[routed.expert_Nk])
    assert results[0].equal(results[1])


def test_a_choice_that_cannot_be_is_an_error() -> None:
    part = plain(Drawn("float32"))
    x, routed = torch.zeros(1, 36), Routed.empty(part, 1)
    layer = compiled.Experts(part)
    for choice, message in (([0, 5], "no expert 5 among 5"), ([-1, 0], "no expert -1"), ([2, 2], "expert 2 twice")):
        routed.expert_Nk[0] = torch.tensor(choice)
        with pytest.raises(ValueError, match=message):
            layer.compute(x, x, x.clone(), routed, 1)


NORMS = {"rmsnorm": lambda n: Input("rmsnorm", torch.linspace(0.5, 2, n), None, 1e-6), "none": lambda n: Input()}


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("case", ["plain", "window", "alibi", "norms", "norms over all heads"])
def test_attention(case: str, heads: tuple[int, int], cache: torch.dtype) -> None:
    drawn, (queries, keys), dim = Drawn("float32"), heads, 20
    norm = NORMS["rmsnorm" if "norms" in case else "none"]
    over_all = "over all" in case
    angles = drawn.numbers(40, 6)
    part = Attention(
        HeadLayout(queries, keys, dim),
        window=7 if case == "window" else None,
        query_norm=norm(dim * queries if over_all else dim),
        key_norm=norm(dim * keys if over_all else dim),
        over_all_heads=over_all,
        cosines=None if case == "plain" else angles.cos(),
        sines=None if case == "plain" else angles.sin(),
        slopes=drawn.numbers(queries).abs() if case == "alibi" else None,
    )
    lengths = (0, 1, 5, 30)
    fused = drawn.numbers(len(lengths), (queries + 2 * keys) * dim)
    caches = [tuple(drawn.numbers(keys, 31 + n, dim).to(cache) for _ in range(2)) for n in range(len(lengths))]
    ours = [tuple(part.clone() for part in pair) for pair in caches]
    wanted = reference.attention(part, fused, caches, lengths)  # type: ignore[arg-type]
    for threads in THREADS:
        y = torch.empty_like(wanted)
        places = [pair[which].data_ptr() for which in range(2) for pair in ours]
        compiled.Attention(part, cache)(fused, y, places, [*lengths, *(pair[0].shape[1] for pair in ours)], threads)
        near(y, wanted, 2e-5 if cache == torch.float32 else 1e-2)
        for pair, right in zip(ours, caches, strict=True):
            for got, expected in zip(pair, right, strict=True):
                near(got.float(), expected.float(), 2e-5 if cache == torch.float32 else 1e-2)


def test_a_full_cache_is_an_error() -> None:
    cache = torch.zeros(1, 3, 4)
    layer = compiled.Attention(Attention(HeadLayout(1, 1, 4)), torch.float32)
    with pytest.raises(ValueError, match="a cache of 3 positions is full"):
        layer(torch.zeros(1, 12), torch.zeros(1, 4), [cache.data_ptr(), cache.data_ptr()], [3, 3], 1)


def test_formats_that_are_not_served_are_errors() -> None:
    with pytest.raises(compiled.FormatNotServed, match="float16"):
        compiled.Linear(Linear(Matrix(torch.zeros(2, 2, dtype=torch.float16)), None))
    with pytest.raises(compiled.FormatNotServed, match="scale for each row"):
        compiled.Linear(Linear(Matrix(torch.zeros(2, 2, dtype=torch.int8)), None))


def test_every_activation_has_the_same_number_in_csrc() -> None:
    x = torch.linspace(-4, 4, 33)[None]
    for name in ACTIVATIONS:
        part = Linear(Matrix(torch.eye(33)), None, Input("activation", activation=name))
        y = torch.empty_like(x)
        compiled.Linear(part)(x, y, 1)
        near(y, reference.linear(part, x))


def test_int8_rows_lose_at_most_half_a_step() -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1, 1e3, 0, 1, 1])[:, None]
    got = quantize_rows(weight)
    assert got.weight.dtype == torch.int8
    assert bool(((got.wide() - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all())


@pytest.mark.parametrize("columns", [4096, 4099, 9001])
def test_int8_sums_of_the_largest_numbers_do_not_overflow(columns: int) -> None:
    weight = torch.ones(11, columns) * torch.tensor([1.0, -1.0]).repeat(6)[:11, None]
    part = Linear(quantize_rows(weight), None)
    for rows in (1, 3):
        y = torch.empty(rows, 11)
        compiled.Linear(part)(torch.full((rows, columns), 5.0), y, 2)
        near(y, 5.0 * columns * weight[:, 0].expand(rows, 11), 1e-6)


@pytest.mark.parametrize(("value", "wanted"), [(1e36, 1e36), (1e-30, 1e-30), (0.0, 0.0), (float("nan"), float("nan")), (float("inf"), float("nan"))])
def test_int8_beside_very_large_very_small_and_lost_numbers(value: float, wanted: float) -> None:
    """A row with a number that is not finite has no results; the other rows of the call keep theirs."""
    part = Linear(quantize_rows(torch.eye(3, 40)), None)
    x = torch.zeros(2, 40)
    x[0, 0], x[1, 1] = value, 2.0
    y = torch.empty(2, 3)
    compiled.Linear(part)(x, y, 1)
    torch.testing.assert_close(y[0, 0], torch.tensor(wanted), equal_nan=True, rtol=1e-4, atol=0)
    assert y[1].tolist() == [0, 2, 0]
