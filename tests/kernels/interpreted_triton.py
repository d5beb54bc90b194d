"""Run by `test_triton.py` under TRITON_INTERPRET=1: sizes that need several tiles and divide none, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron.kernels import grouped_gemm as gemm
from megatron.kernels import grouped_lore as lore
from megatron.kernels import permute as perm
from megatron.kernels.grouped_lore.interface import HiddenLayer, LoreChoice, Projection

# Rows of each expert: tiles of 64 are cut at experts, the last tile of an expert is not full.
ROWS = [150, 0, 7]
D, F, M, Q = 70, 83, 3, 19
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that both dtypes hold exactly, so that only the arithmetic differs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(shape[-1] ** -0.25).half().double()


def compare(compute: Callable[[str, Sequence[Tensor]], Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Values and gradients of Triton in `dtype` against the reference in float64, relative to the largest number of each."""
    results = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        given = [t.to(kind).requires_grad_() for t in inputs]
        out = compute(backend, given)
        assert out.dtype == kind
        grads = torch.autograd.grad(out, given, draw(*out.shape, seed=9).to(kind))
        results.append([out, *grads])
    for got, wanted in zip(*results, strict=True):
        bound = TOLERANCE[dtype] * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=bound)


@DTYPES
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_gemm(transposed: bool, dtype: torch.dtype) -> None:
    counts = torch.tensor(ROWS)
    weight = draw(len(ROWS), F, D, seed=1) if transposed else draw(len(ROWS), D, F, seed=1)
    compare(lambda b, t: gemm.grouped_gemm(t[0], t[1], counts, transposed=transposed, backend=b), (draw(sum(ROWS), D), weight), dtype)


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("choices", [None, 1, 2])
def test_hidden_layer(choices: int | None, gated: bool, dtype: torch.dtype) -> None:
    """Every part is there. `choices` None: each expert has one LoRE."""
    rows, experts = sum(ROWS), len(ROWS)
    lores = experts if choices is None else experts * M
    parts = [draw(experts, F, D, seed=2), draw(lores, Q, D, seed=3), draw(lores, Q, F, seed=4), draw(experts, F, seed=5)]
    owner = torch.repeat_interleave(torch.arange(experts), torch.tensor(ROWS))
    picks = torch.rand(rows, M, generator=torch.Generator().manual_seed(6)).argsort(1)[:, : choices or 1]
    order = perm.sort_by_group(owner[:, None] * M + picks, experts * M, backend="reference")
    inputs = [draw(rows, D), draw(rows, choices or 1, seed=7), *parts, *([t.flip(1) for t in parts] if gated else [])]

    def compute(backend: str, given: Sequence[Tensor]) -> Tensor:
        x, pi, *places = given
        up, gate = Projection(*places[:4]), Projection(*places[4:]) if gated else None
        choice = None if choices is None else LoreChoice(pi, order)
        return lore.grouped_lore(x, HiddenLayer(torch.tensor(ROWS), "gelu", up, gate, choice), backend=backend) + 0 * pi.sum()

    compare(compute, inputs, dtype)


@DTYPES
def test_permute_and_combine(dtype: torch.dtype) -> None:
    order = perm.sort_by_group(torch.randint(5, (33, 2), generator=torch.Generator().manual_seed(8)), 5, backend="reference")

    def compute(backend: str, given: Sequence[Tensor]) -> Tensor:
        rows = perm.permute(given[0], order, backend=backend) * 2
        return perm.combine(rows, order, given[1], backend=backend) + perm.combine(rows, order, backend=backend)

    compare(compute, (draw(33, 530), draw(33, 2, seed=1)), dtype)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 3], "row counts sum to 6, but there are 5 rows"),
        ([-1, 6], "row counts must be 0 or more, and one is -1"),
        ([2.0, 3.0], "they must be whole numbers"),
    ],
)
def test_wrong_counts_are_refused(counts: list[float], message: str) -> None:
    for call in (
        lambda rows: gemm.grouped_gemm(torch.zeros(5, 3), torch.zeros(2, 3, 4), rows, backend="triton"),
        lambda rows: lore.grouped_lore(torch.zeros(5, 3), HiddenLayer(rows, "silu", Projection(torch.zeros(2, 4, 3))), backend="triton"),
    ):
        with pytest.raises(ValueError, match=message):
            call(torch.tensor(counts))


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is torch.float16 on cpu, but x is torch.float32 on cpu"):
        gemm.grouped_gemm(torch.zeros(5, 3), torch.zeros(1, 3, 4).half(), torch.tensor([5]), backend="triton")


def test_nan_stays_in_its_rows() -> None:
    x = torch.ones(6, 3)
    x[2] = float("nan")
    y = lore.grouped_lore(x, HiddenLayer(torch.tensor([2, 4]), "relu", Projection(torch.ones(2, 4, 3))), backend="triton")
    assert y.isnan().any(1).tolist() == [False, False, True, False, False, False]
