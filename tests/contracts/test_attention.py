"""The attention op: every implementation that can run here, every edge; values and gradients against a softmax written out a query at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.kernels import attention as att
from megatron.kernels.attention import HeadLayout, Rotation
from megatron.testing.devices import DEVICES
from tests.contracts.comparing import NANS, check, check_that_threads_change_no_bit, draw, nan_of, skip_unless_it_runs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
BACKENDS = [implementation.name for implementation in att.OP.implementations()]
# batch, query heads, key/value heads, length, dim: lengths around the borders of tiles (48 or 96 queries, 96 keys), dims around vectors
SHAPES = [(1, 1, 1, 1, 1), (2, 4, 2, 3, 20), (1, 2, 2, 48, 16), (1, 2, 1, 49, 7), (1, 3, 1, 97, 64), (2, 1, 1, 195, 33), (1, 1, 1, 100, 256)]
EMPTY = [(0, 2, 2, 5, 4), (2, 2, 1, 0, 4)]


def angles(length: int, half: int, batch: int | None, device: str = "cpu") -> Rotation:
    """Different angles in each text with a batch."""
    shape = (length, half) if batch is None else (batch, length, half)
    angle = torch.rand(shape, generator=torch.Generator().manual_seed(3)).mul(6).to(device)
    return Rotation(angle.cos(), angle.sin())


def turn_one(x_d: Tensor, cos_n: Tensor, sin_n: Tensor) -> Tensor:
    half = len(cos_n)
    one, two = x_d[:half], x_d[half : 2 * half]
    return torch.cat([one * cos_n - two * sin_n, two * cos_n + one * sin_n, x_d[2 * half :]])


def definition(query_BHSd: Tensor, key_BKSd: Tensor, value_BKSd: Tensor, rotation: Rotation | None = None) -> Tensor:
    """One query at a time."""
    batch, heads, length, dim = query_BHSd.shape
    times = heads // key_BKSd.shape[1]
    wide = None if rotation is None else [t.to(query_BHSd).expand(batch, -1, -1) for t in rotation]
    context = [0 * (query_BHSd.sum() + key_BKSd.sum() + value_BKSd.sum()) + query_BHSd.new_zeros(0, dim)]
    for b in range(batch):
        for h in range(heads):
            keys = key_BKSd[b, h // times]
            if wide is not None:
                keys = torch.stack([turn_one(keys[s], wide[0][b, s], wide[1][b, s]) for s in range(length)])
            for s in range(length):
                q = query_BHSd[b, h, s] if wide is None else turn_one(query_BHSd[b, h, s], wide[0][b, s], wide[1][b, s])
                weights = torch.softmax(keys[: s + 1] @ q / math.sqrt(dim), 0)
                context.append((weights @ value_BKSd[b, h // times, : s + 1])[None])
    return torch.cat(context).view(batch, heads, length, dim)


def parts(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, length, dim = shape
    return tuple(draw(batch, n, length, dim, dtype=dtype, device=device, seed=place) for place, n in enumerate((heads, kv_heads, kv_heads)))  # type: ignore[return-value]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(backend: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    skip_unless_it_runs("attention", backend, device)
    check(lambda *given: att.attention(*given, backend=backend), definition, parts(shape, dtype, device), TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("turned", [None, "all", "half", "each text"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fused_projection(backend: str, turned: str | None, heads: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Its gradient is one tensor; the first n dimensions of queries and keys are turned, by angles that may differ between texts."""
    skip_unless_it_runs("attention", backend, device)
    batch, length, dim = 2, 13, 12
    layout = HeadLayout(*heads, dim)
    half = {"half": 3}.get(str(turned), dim // 2)
    rotation = None if turned is None else angles(length, half, batch if turned == "each text" else None, device)

    def wanted(fused: Tensor) -> Tensor:
        return definition(*(t.transpose(1, 2) for t in layout.views(fused)), rotation)

    fused = draw(batch, length, (heads[0] + 2 * heads[1]) * dim, dtype=dtype, device=device)
    check(lambda x: att.fused_attention(x, layout, rotation, backend=backend), wanted, (fused,), TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_expanded_gradients(backend: str) -> None:
    skip_unless_it_runs("attention", backend)
    base = draw(3, 2, 5, 8, 50)
    query, key, value = (t.permute(0, 2, 3, 1) for t in base.unbind(0))  # the last dimension is not contiguous
    strided = att.attention(query, key, value, backend=backend)
    plain = att.attention(*(t.contiguous() for t in (query, key, value)), backend=backend)
    torch.testing.assert_close(strided, plain)
    for reduce in (Tensor.sum, lambda y: y[:, :1, ::2].square().sum()):
        got, wanted = torch.autograd.grad(reduce(strided), base, retain_graph=True), torch.autograd.grad(reduce(plain), base, retain_graph=True)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_size(backend: str) -> None:
    """Far above what e^x can hold, and all equal."""
    skip_unless_it_runs("attention", backend)
    query, key, value = (t.detach() for t in parts((1, 1, 1, 130, 16), torch.float32, "cpu"))
    for factor in (0.0, 1e4):
        inputs = tuple(t.clone().requires_grad_() for t in (query * factor, key, value))
        got, wanted = att.attention(*inputs, backend=backend), definition(*(t.detach().double() for t in inputs))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(got.sum(), inputs))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_bf16_queries_and_keys_are_not_rounded_twice(backend: str) -> None:
    """1/sqrt(128) is no bf16: scaled before a product, the queries would lose as much again. Large scores show it."""
    skip_unless_it_runs("attention", backend)
    query, key, value, grad = (t.detach() for t in (*parts((1, 2, 2, 300, 128), torch.bfloat16, "cpu"), draw(1, 2, 300, 128, dtype=torch.bfloat16)))
    query, key = query * 4, key * 4

    def results(dtype: torch.dtype, name: str) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        y = att.attention(*inputs, backend=name)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(dtype))]

    for found, wanted in zip(results(torch.bfloat16, backend), results(torch.float64, "reference"), strict=True):
        assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("bits", NANS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_after_its_place(backend: str, bits: int) -> None:
    """A key that is not a number spoils the queries that see it, and no other."""
    skip_unless_it_runs("attention", backend)
    query, key, value = (t.detach().clone() for t in parts((1, 1, 1, 120, 16), torch.float32, "cpu"))
    key[0, 0, 101, 3] = nan_of(bits)
    spoiled = att.attention(query, key, value, backend=backend)[0, 0].isnan().any(-1)
    assert spoiled.tolist() == [s >= 101 for s in range(120)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    skip_unless_it_runs("attention", "compiled")

    def compute() -> list[Tensor]:
        inputs = parts((1, 4, 2, 200, 24), dtype, "cpu")
        y = att.attention(*inputs, angles(200, 12, None), backend="compiled")
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    check_that_threads_change_no_bit(compute, (1, 2, 3, 7))


def test_gradcheck() -> None:
    inputs = tuple(draw(1, n, 5, 6, dtype=torch.float64, seed=n) for n in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *given: att.attention(*given, angles(5, 2, None), backend="reference"), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_keeps_pytorch_rules(backend: str) -> None:
    skip_unless_it_runs("attention", backend)
    torch.library.opcheck(att._attention.overload, (list(parts((1, 2, 1, 5, 8), torch.float32, "cpu")), [2, 1, 8], [], backend))
    torch.library.opcheck(att._attention.overload, ([draw(1, 5, 32)], [2, 1, 8], list(angles(5, 4, None)), backend))


Q, KV = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
LAYOUT = HeadLayout(2, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: att.attention(Q, KV, KV[:, :, :4]),
            r"shapes \(1, 4, 5, 8\), \(1, 2, 5, 8\), \(1, 2, 4, 8\); they must be \[batch, heads, length, dim\]",
        ),
        (lambda: att.attention(Q[0], KV[0], KV[0]), r"they must be \[batch, heads, length, dim\]"),
        (lambda: att.attention(Q[:, :, :3], KV, KV), "differ in heads only"),
        (lambda: att.attention(Q[:, :3], KV, KV), "3 query heads cannot be shared out among 2 key/value heads"),
        (lambda: att.attention(Q, KV[:, :0], KV[:, :0]), "4 query heads cannot be shared out among 0"),
        (lambda: att.attention(Q, KV.double(), KV), "queries, keys and values are torch.float32 on cpu, torch.float64 on cpu"),
        (lambda: att.attention(Q.int(), KV.int(), KV.int()), "must have one floating-point format"),
        (lambda: att.attention(Q, KV.to("meta"), KV.to("meta")), "torch.float32 on meta"),
        (lambda: att.attention(Q[..., :0], KV[..., :0], KV[..., :0]), "heads of 0 dimensions"),
        (lambda: att.fused_attention(torch.zeros(1, 5, 47), LAYOUT), r"shape \(1, 5, 47\) for HeadLayout"),
        (lambda: att.fused_attention(torch.zeros(1, 5, 48), LAYOUT, angles(4, 4, None)), r"cosines \(4, 4\) .* for 1 texts of 5 tokens"),
        (lambda: att.fused_attention(torch.zeros(1, 5, 48), LAYOUT, angles(5, 5, None)), "with n at most the dimensions"),
        (lambda: att.fused_attention(torch.zeros(1, 5, 48), LAYOUT, angles(5, 4, 2)), r"cosines \(2, 5, 4\)"),
        (lambda: att.attention(Q, KV, KV, backend="none"), "there is no implementation 'none'"),
    ],
)
def test_what_does_not_fit_is_said(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
