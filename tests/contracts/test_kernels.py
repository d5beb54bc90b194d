"""Every op, every implementation that can run here, every edge: values and gradients against a definition written out row by row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron.kernels import grouped_gemm as gemm
from megatron.kernels import grouped_lore as lore
from megatron.kernels import permute as perm
from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.grouped_lore.interface import HiddenLayer, LoreChoice, Projection
from megatron.testing.devices import DEVICES
from tests.contracts.comparing import NANS, check, implementations, nan_of, skip_unless_it_runs

ROWS = {"even": [3, 3, 3], "empty_expert": [5, 0, 4], "all_on_one": [0, 9, 0], "single_row": [1, 0, 0], "no_rows": [0, 0, 0]}
D, F, M, Q = 7, 5, 2, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}


class Draw:
    """Random tensors from one seed."""

    def __init__(self, dtype: torch.dtype, device: str, scale: float = 1) -> None:
        self.generator, self.dtype, self.device, self.scale = torch.Generator().manual_seed(0), dtype, device, scale

    def __call__(self, *shape: int) -> Tensor:
        return (self.scale * torch.randn(*shape, generator=self.generator)).to(self.device, self.dtype).requires_grad_()


def owners(rows: list[int]) -> list[int]:
    return [e for e, count in enumerate(rows) for _ in range(count)]


def gemm_definition(rows: list[int], transposed: bool) -> Callable[..., Tensor]:
    def compute(x: Tensor, weight: Tensor) -> Tensor:
        parts = [x[r] @ (weight[e].T if transposed else weight[e]) for r, e in enumerate(owners(rows))]
        return torch.stack(parts) if parts else 0 * (x.sum() + weight.sum()) + x.new_zeros(0, F)

    return compute


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("backend", implementations("grouped_gemm"))
def test_grouped_gemm(backend: str, rows: list[int], transposed: bool, dtype: torch.dtype, device: str) -> None:
    skip_unless_it_runs("grouped_gemm", backend, device)
    draw, counts = Draw(dtype, device), torch.tensor(rows, device=device)
    inputs = draw(sum(rows), D), draw(len(rows), F, D) if transposed else draw(len(rows), D, F)
    check(lambda x, w: gemm.grouped_gemm(x, w, counts, transposed=transposed, backend=backend), gemm_definition(rows, transposed), inputs, TOLERANCE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("deep", "wide"), [(1024, 520), (2048, 70), (1101, 520), (512, 512)])
@pytest.mark.parametrize("backend", implementations("grouped_gemm"))
def test_grouped_gemm_of_long_rows(backend: str, deep: int, wide: int, dtype: torch.dtype) -> None:
    """Rows that collide in the cache are copied; a weight with many rows is packed a part at a time."""
    skip_unless_it_runs("grouped_gemm", backend)
    draw, counts = Draw(dtype, "cpu", scale=0.1), torch.tensor([0, 601, 3])
    for transposed in (False, True):
        inputs = draw(604, deep), draw(3, *((wide, deep) if transposed else (deep, wide)))
        ours, right = (partial(gemm.grouped_gemm, rows_E=counts, transposed=transposed, backend=name) for name in (backend, "reference"))
        check(ours, right, inputs, TOLERANCE)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", implementations("grouped_gemm"))
def test_grouped_gemm_of_narrow_rows(backend: str, transposed: bool) -> None:
    """As in a bf16 model, whose routers compute in float32: the rows are not kept in float32, and their gradient is in bf16."""
    skip_unless_it_runs("grouped_gemm", backend)
    x, weight = Draw(torch.bfloat16, "cpu")(5, D), Draw(torch.float32, "cpu")(2, *((F, D) if transposed else (D, F)))
    counts, kept = torch.tensor([2, 3]), list[torch.dtype]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = gemm.grouped_gemm(x, weight, counts, transposed=transposed, backend=backend)
    wide = [t.detach().float().requires_grad_() for t in (x, weight)]
    wanted = gemm.grouped_gemm(*wide, counts, transposed=transposed, backend=backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    wide_x, wide_weight = torch.autograd.grad(wanted, wide, grad)
    assert kept == [torch.bfloat16, torch.float32, torch.int64]
    assert torch.equal(y, wanted)
    assert torch.equal(grad_x, wide_x.bfloat16())
    assert torch.equal(grad_weight, wide_weight)
    with pytest.raises(ValueError, match="x may be narrower than the weight, not wider"):
        gemm.grouped_gemm(wide[0], weight.bfloat16(), counts, transposed=transposed, backend=backend)


def lore_case(rows: list[int], choices: int) -> tuple[perm.Order, list[list[int]]]:
    """Random LoREs of each row: the order by LoRE, and for each row the LoREs (numbered over all experts) that it uses."""
    generator = torch.Generator().manual_seed(2)
    local = [torch.randperm(M, generator=generator)[:choices] + e * M for e in owners(rows)]
    chosen = torch.stack(local) if local else torch.zeros(0, choices, dtype=torch.int64)
    return perm.sort_by_group(chosen, len(rows) * M), chosen.tolist()


PARTS = ("weight", "a", "b", "bias")
KINDS = {
    "plain": (("weight",), ()),
    "plain with biases and a gate": (("weight", "bias"), ("weight", "bias")),
    "entangled": (("weight", "a", "b"), ()),
    "entangled up": (("weight", "a", "b"), ("weight",)),
    "entangled gate with biases": (("weight", "bias"), ("weight", "a", "b", "bias")),
    "entangled both": (("weight", "a", "b"), ("weight", "a", "b")),
    "multiplied": (("a", "b"), ("weight",)),
    "decomposed": (("a", "b", "bias"), ()),
    "decomposed with a gate": (("a", "b"), ("a", "b")),
}
"""Which parts the projections `up` and `gate` have."""


def lore_definition(rows: list[int], chosen: list[list[int]] | None, kind: str, activation: str) -> Callable[..., Tensor]:
    """Equation 2 and the activation, a row at a time; without `chosen` every expert has one LoRE, with pi = 1."""
    act = ACTIVATIONS[activation].value

    def project(x: Tensor, r: int, e: int, there: dict[str, Tensor], pi: Tensor) -> Tensor:
        p = there["weight"][e] @ x[r] if "weight" in there else x.new_zeros(F)
        if "a" in there:
            for choice, g in enumerate([e] if chosen is None else chosen[r]):
                p = p + (1 if chosen is None else pi[r, choice]) * (there["a"][g] @ x[r]) @ there["b"][g]
        return p + there["bias"][e] if "bias" in there else p

    def compute(x: Tensor, pi: Tensor, *parts: Tensor) -> Tensor:
        up_names, gate_names = KINDS[kind]
        up, gate = dict(zip(up_names, parts, strict=False)), dict(zip(gate_names, parts[len(up_names) :], strict=True))
        hidden = [0 * sum(t.sum() for t in (x, pi, *parts)) + x.new_zeros(0, F)]
        for r, e in enumerate(owners(rows)):
            p = project(x, r, e, up, pi)
            hidden.append((act(project(x, r, e, gate, pi)) * p if gate else act(p))[None])
        return torch.cat(hidden)

    return compute


def lore_inputs(draw: Draw, rows: list[int], kind: str, lores: int) -> list[Tensor]:
    """The parts that the kind has."""
    shapes = {"weight": (len(rows), F, D), "a": (lores, Q, D), "b": (lores, Q, F), "bias": (len(rows), F)}
    return [draw(*shapes[name]) for names in KINDS[kind] for name in names]


def lore_layer(kind: str, parts: tuple[Tensor, ...], counts: Tensor, activation: str, choice: LoreChoice | None) -> HiddenLayer:
    """What the op takes."""
    up_names, gate_names = KINDS[kind]
    places = {"weight": "weight_EFD", "a": "a_GQD", "b": "b_GQF", "bias": "bias_EF"}
    up = Projection(**{places[name]: t for name, t in zip(up_names, parts, strict=False)})
    gate = Projection(**{places[name]: t for name, t in zip(gate_names, parts[len(up_names) :], strict=True)})
    return HiddenLayer(counts, activation, up, gate if gate_names else None, choice)


def check_lore(backend: str, rows: list[int], kind: str, draw: Draw, *, choices: int | None, activation: str = "silu") -> None:
    """`choices`: LoREs of each row; None: nothing is chosen."""
    device, counts = draw.device, torch.tensor(rows, dtype=torch.int64, device=draw.device)
    order, chosen = lore_case(rows, choices or 1)
    order = perm.Order(*(t.to(device) for t in order))
    pi = draw(sum(rows), choices or 1)

    def ours(x: Tensor, pi: Tensor, *parts: Tensor) -> Tensor:
        choice = None if choices is None else LoreChoice(pi, order)
        y = lore.grouped_lore(x, lore_layer(kind, parts, counts, activation, choice), backend=backend)
        return y if choices is not None and "a" in (*KINDS[kind][0], *KINDS[kind][1]) else y + 0 * pi.sum()

    parts = lore_inputs(draw, rows, kind, len(rows) * (1 if choices is None else M))
    definition = lore_definition(rows, chosen if choices is not None else None, kind, activation)
    check(ours, definition, (draw(sum(rows), D), pi, *parts), TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("backend", implementations("grouped_lore"))
def test_grouped_lore(backend: str, rows: list[int], choices: int, dtype: torch.dtype, device: str) -> None:
    skip_unless_it_runs("grouped_lore", backend, device)
    check_lore(backend, rows, "entangled", Draw(dtype, device), choices=choices)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("rows", "width"), [([1100, 16, 17, 0, 256, 257, 512, 513, 1], 70), ([30, 24, 5, 13, 0, 12, 0, 25, 1], 300)], ids=["many", "few"]
)
@pytest.mark.parametrize("backend", implementations("grouped_lore"))
def test_numbers_of_rows_where_a_kernel_goes_another_way(backend: str, rows: list[int], width: int, dtype: torch.dtype) -> None:
    """Against the reference in float64: several passes, and LoREs that are many for so few rows."""
    skip_unless_it_runs("grouped_lore", backend)
    draw = Draw(dtype, "cpu", scale=0.25)

    def compute(x: Tensor, a: Tensor, b: Tensor, *, backend: str) -> Tensor:
        return lore.grouped_lore(x, HiddenLayer(torch.tensor(rows), "silu", Projection(None, a, b)), backend=backend)

    inputs = draw(sum(rows), 12), draw(len(rows), 9, 12), draw(len(rows), 9, width)
    check(partial(compute, backend=backend), partial(compute, backend="reference"), inputs, TOLERANCE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", implementations("grouped_lore"))
def test_a_hidden_layer_of_long_rows(backend: str, dtype: torch.dtype) -> None:
    skip_unless_it_runs("grouped_lore", backend)
    draw, counts = Draw(dtype, "cpu", scale=0.1), torch.tensor([0, 101, 3])

    def compute(x: Tensor, up: Tensor, gate: Tensor, *, backend: str) -> Tensor:
        return lore.grouped_lore(x, HiddenLayer(counts, "silu", Projection(up), Projection(gate)), backend=backend)

    inputs = draw(104, 2048), draw(3, 520, 2048), draw(3, 520, 2048)
    check(partial(compute, backend=backend), partial(compute, backend="reference"), inputs, TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choices", [None, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", implementations("grouped_lore"))
def test_every_kind_of_hidden_layer(backend: str, kind: str, choices: int | None, device: str) -> None:
    skip_unless_it_runs("grouped_lore", backend, device)
    for rows in ROWS.values():
        check_lore(backend, rows, kind, Draw(torch.float32, device), choices=choices)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", implementations("grouped_lore"))
def test_every_activation(backend: str, activation: str, dtype: torch.dtype, device: str) -> None:
    skip_unless_it_runs("grouped_lore", backend, device)
    for kind in ("plain", "entangled both"):
        check_lore(backend, ROWS["empty_expert"], kind, Draw(dtype, device, scale=0.5), choices=1, activation=activation)


@pytest.mark.parametrize("bits", NANS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", implementations("grouped_lore"))
def test_a_nan_spoils_its_row_alone(backend: str, activation: str, bits: int) -> None:
    """Hidden layer and the gradient that goes through the activation."""
    skip_unless_it_runs("grouped_lore", backend)
    x, weight = torch.ones(4, 16), torch.randn(1, 33, 16, generator=torch.Generator().manual_seed(0))
    x[1, 3] = nan_of(bits)
    x.requires_grad_()
    hidden = lore.grouped_lore(x, HiddenLayer(torch.tensor([4]), activation, Projection(weight)), backend=backend)
    assert hidden.isnan().all(1).tolist() == [False, True, False, False]
    (grad,) = torch.autograd.grad(hidden.sum(), x)
    if activation not in ("identity", "relu"):  # their slope is a number everywhere
        assert grad.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 1), (5, 1), (6, 2), (1, 3)])
@pytest.mark.parametrize("backend", implementations("permute"))
def test_permute_and_combine(backend: str, tokens: int, top_k: int, dtype: torch.dtype, device: str) -> None:
    skip_unless_it_runs("permute", backend, device)
    draw = Draw(dtype, device)
    expert_TK = torch.randint(3, (tokens, top_k), generator=torch.Generator().manual_seed(3))
    order = perm.Order(*(t.to(device) for t in perm.sort_by_group(expert_TK, 4)))
    x, weight, scale = draw(tokens, D), draw(tokens, top_k), draw(tokens * top_k, 1)

    flat = expert_TK.flatten().tolist()
    by_expert = sorted(range(tokens * top_k), key=lambda choice: flat[choice])
    assert order.order_R.tolist() == by_expert
    assert order.rows_G.tolist() == [flat.count(e) for e in range(4)]
    assert perm.permute(x, order, backend=backend).tolist() == [x[choice // top_k].tolist() for choice in by_expert]

    def ours(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        rows = perm.permute(x, order, backend=backend) * scale
        return perm.combine(rows, order, weight, backend=backend) + perm.combine(rows, order, backend=backend)

    def definition(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        y = 0 * (x + weight.sum() + scale.sum())
        for place, choice in enumerate(by_expert):
            token, k = divmod(choice, top_k)
            y = y + torch.nn.functional.one_hot(torch.tensor(token), tokens)[:, None].to(y) * x[token] * scale[place] * (1 + weight[token, k])
        return y

    check(ours, definition, (x, weight, scale), TOLERANCE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(6, 3, 1030), (5, 2, 0), (300, 2, 257), (3, 4, 8)])
@pytest.mark.parametrize("backend", implementations("permute"))
def test_rows_with_empty_choices(backend: str, tokens: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    """A token may have fewer than K rows, or none; rows are longer than what fits into one block, and given in any strides."""
    skip_unless_it_runs("permute", backend, "cpu")
    draw = Draw(dtype, "cpu")
    group_TK = torch.randint(4, (tokens, top_k), generator=torch.Generator().manual_seed(6))
    group_TK[0] = 3  # the first token has no row
    order = perm.sort_by_group(group_TK, 3, padded=True, backend=backend)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        rows = perm.permute(x.t(), order, backend=backend)
        turned = rows.t().contiguous().t()
        return perm.combine(turned, order, weight.t(), backend=backend) + perm.combine(rows, order, backend=backend)

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        return x.t() * ((1 + weight.t()) * (group_TK < 3)).sum(1, keepdim=True)

    check(ours, definition, (draw(width, tokens), draw(top_k, tokens)), TOLERANCE)


@pytest.mark.parametrize("backend", implementations("permute"))
def test_weights_of_another_format(backend: str) -> None:
    """As in a bf16 model, whose router computes in float32: rows and their gradient in bf16, weights and theirs in float32."""
    skip_unless_it_runs("permute", backend, "cpu")
    x, weight = Draw(torch.bfloat16, "cpu")(4, D), Draw(torch.float32, "cpu")(4, 2)
    order = perm.sort_by_group(torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1]]), 3)
    y = perm.combine(perm.permute(x, order, backend=backend), order, weight, backend=backend)
    grad_x, grad_weight = torch.autograd.grad(y.float().sum(), (x, weight))
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.double(), x.double() * weight.double().sum(1, keepdim=True), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(grad_weight, x.float().sum(1, keepdim=True).expand(4, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", implementations("grouped_gemm"))
def test_grouped_gemm_takes_any_strides(backend: str) -> None:
    skip_unless_it_runs("grouped_gemm", backend, "cpu")
    draw, counts = Draw(torch.float32, "cpu"), torch.tensor([4, 0, 2])
    x, weight = draw(D, 6), draw(F, 3, D)
    strided = gemm.grouped_gemm(x.t(), weight.permute(1, 2, 0), counts, backend=backend)
    plain = gemm.grouped_gemm(x.t().contiguous(), weight.permute(1, 2, 0).contiguous(), counts, backend=backend)
    torch.testing.assert_close(strided, plain)
    for got, wanted in zip(torch.autograd.grad(strided.sum(), (x, weight)), torch.autograd.grad(plain.sum(), (x, weight)), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", implementations("grouped_lore"))
def test_grouped_lore_takes_any_strides(backend: str) -> None:
    """Turned inputs, and a gradient that one number stands for (its strides are 0)."""
    skip_unless_it_runs("grouped_lore", backend, "cpu")
    draw, (order, _), counts = Draw(torch.float32, "cpu"), lore_case([4, 0, 2], 2), torch.tensor([4, 0, 2])
    inputs = draw(D, 6), draw(2, 6), draw(D, F, 3), draw(D, Q, 6), draw(F, Q, 6)

    def compute(x: Tensor, pi: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        layer = HiddenLayer(counts, "silu", Projection(weight, a, b), choice=LoreChoice(pi, order))
        return lore.grouped_lore(x, layer, backend=backend)

    turned = [t.permute(*reversed(range(t.ndim))) for t in inputs]
    strided, plain = compute(*turned), compute(*(t.contiguous() for t in turned))
    torch.testing.assert_close(strided, plain)
    for got, wanted in zip(torch.autograd.grad(strided.sum(), inputs), torch.autograd.grad(plain, inputs, torch.ones(6, F)), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("counts", "message"), [([3, 3], "sum to (6|more than 5), but there are 5 rows"), ([-1, 6], "-1|negative|below 0"), ([5], "one count for each")]
)
@pytest.mark.parametrize("backend", implementations("grouped_gemm"))
def test_counts_that_do_not_fit(backend: str, counts: list[int], message: str) -> None:
    skip_unless_it_runs("grouped_gemm", backend, "cpu")
    with pytest.raises(ValueError, match=message):
        gemm.grouped_gemm(torch.zeros(5, 3), torch.zeros(2, 3, 4), torch.tensor(counts), backend=backend)


def test_the_ops_keep_pytorch_rules() -> None:
    """Schemas, fake tensors and autograd registration, as torch checks them."""
    draw, (order, _), counts = Draw(torch.float64, "cpu"), lore_case([4, 0, 2], 2), torch.tensor([4, 0, 2])
    x, pi = draw(6, D), draw(6, 2)
    weights = [draw(3, F, D), draw(6, Q, D), draw(6, Q, F)]
    torch.library.opcheck(gemm._grouped_gemm.overload, (x, weights[0], counts, True, "reference"))
    for there, parts in (([True] * 3 + [False] * 5, weights), ([True] * 3 + [False, True] + [False] * 3, [*weights, draw(3, F, D)])):
        torch.library.opcheck(lore._grouped_lore.overload, (x, counts, parts, there, [pi, *order], "silu", True, "reference"))
    for padded in (False, True):
        torch.library.opcheck(perm._sort.overload, (torch.tensor([[0, 1], [1, 0], [2, 0]]), 3, padded, "reference"))
    order = perm.sort_by_group(torch.tensor([[0, 1], [1, 0], [2, 0]]), 3)
    torch.library.opcheck(perm._permute.overload, (draw(3, D), order.order_R, order.inverse_TK, "reference"))
    torch.library.opcheck(perm._combine.overload, (x, order.order_R, order.inverse_TK, "reference"))
    torch.library.opcheck(perm._weighted_combine.overload, (x, order.order_R, order.inverse_TK, draw(3, 2), "reference"))


@pytest.mark.parametrize("choices", [1, 2])
def test_gradcheck_of_the_lore_op(choices: int) -> None:
    rows = [3, 0, 2]
    draw, (order, _) = Draw(torch.float64, "cpu"), lore_case(rows, choices)
    inputs = draw(5, 4), draw(3, 3, 4), draw(6, 2, 4), draw(6, 2, 3), draw(5, choices)

    def compute(x: Tensor, w: Tensor, a: Tensor, b: Tensor, pi: Tensor) -> Tensor:
        layer = HiddenLayer(torch.tensor(rows), "silu", Projection(w, a, b), choice=LoreChoice(pi, order))
        return lore.grouped_lore(x, layer, backend="reference")

    assert torch.autograd.gradcheck(compute, inputs)


def test_two_runs_are_equal_bit_for_bit() -> None:
    def gradients() -> list[Tensor]:
        draw = Draw(torch.float32, "cpu")
        x, weight = draw(64, D), draw(64, 2)
        order = perm.sort_by_group(torch.randint(5, (64, 2), generator=torch.Generator().manual_seed(4)), 5)
        y = perm.combine(perm.permute(x, order).tanh(), order, weight)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]

    assert all(torch.equal(one, two) for one, two in zip(gradients(), gradients(), strict=True))


COUNTS = torch.tensor([1, 1])
ORDER = perm.sort_by_group(torch.tensor([[0], [1]]), 2)
CHOICE = LoreChoice(torch.ones(2, 1), ORDER)


def z(*shape: int) -> Tensor:
    return torch.zeros(shape)


def compute(x: Tensor, up: Projection, gate: Projection | None = None, choice: LoreChoice | None = None, activation: str = "gelu") -> Tensor:
    """The hidden layer of two experts that have a row each."""
    return lore.grouped_lore(x, HiddenLayer(COUNTS, activation, up, gate, choice))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gemm.grouped_gemm(z(2, 3), z(2, 4, 5), COUNTS), r"x \(2, 3\) must be \[rows, in\] and the weight \(2, 4, 5\) \[experts, in, out\]"),
        (lambda: gemm.grouped_gemm(z(2, 3), z(2, 3, 5), COUNTS, transposed=True), r"\[experts, out, in\]"),
        (lambda: gemm.grouped_gemm(z(2, 3), z(3, 3, 5), COUNTS), r"row counts of shape \(2,\) for 3 experts; give one count for each"),
        (lambda: gemm.grouped_gemm(z(3, 3), z(2, 3, 5), COUNTS), "row counts sum to 2, but there are 3 rows"),
        (lambda: compute(z(2), Projection(z(2, 5, 3))), r"x \(2,\) must be \[rows, in\]"),
        (lambda: compute(z(2, 3), Projection(z(5, 3))), "must be three-dimensional"),
        (lambda: compute(z(2, 3), Projection()), "a projection needs a weight, or the factors a and b, or all three"),
        (lambda: compute(z(2, 3), Projection(z(2, 5, 3), z(2, 2, 3))), "a projection needs a weight, or the factors a and b, or all three"),
        (lambda: compute(z(2, 3), Projection(z(2, 5, 3), z(2, 2, 4), z(2, 2, 5))), "do not fit: weight is"),
        (lambda: compute(z(2, 3), Projection(z(2, 5, 3), bias_EF=z(2, 4))), "do not fit: weight is"),
        (lambda: compute(z(2, 3), Projection(z(3, 5, 3))), "do not fit: .* one count per expert"),
        (lambda: compute(z(2, 3), Projection(z(2, 5, 3)), Projection(z(2, 6, 3))), "up and gate have the widths 5 and 6"),
        (lambda: compute(z(2, 3), Projection(z(2, 5, 3), z(3, 2, 3), z(3, 2, 5))), "3 LoREs for 2 experts and no choice"),
        (lambda: compute(z(2, 3), Projection(z(2, 5, 3), z(3, 2, 3), z(3, 2, 5)), choice=CHOICE), "3 LoREs cannot be shared out among 2 experts"),
        (lambda: compute(z(2, 3), Projection(z(2, 5, 3), z(4, 2, 3), z(4, 2, 5)), choice=CHOICE), r"row counts of shape \(2,\) for 4 LoREs"),
        (lambda: compute(z(3, 3), Projection(z(2, 5, 3)), choice=CHOICE), r"weights \(2, 1\) and order of \(2, 1\) for 3 rows"),
        (lambda: compute(z(3, 3), Projection(z(2, 5, 3))), "row counts sum to 2, but there are 3 rows"),
        (lambda: compute(z(2, 3), Projection(z(2, 5, 3)), activation="geluu"), "there is no activation 'geluu'; known: identity, gelu"),
        (lambda: perm.permute(z(3, 4), ORDER), "permute: 3 tokens for an order of 2"),
        (lambda: perm.combine(z(3, 4), ORDER), "combine: 3 rows for an order of 2"),
        (lambda: perm.combine(z(2, 4), ORDER, z(2, 2)), r"weights \(2, 2\) for choices \(2, 1\)"),
    ],
)
def test_shapes_that_do_not_fit(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def made(order_R: list[int], inverse_TK: list[list[int]]) -> perm.Order:
    """An order that nothing sorted, of two groups."""
    return perm.Order(torch.tensor(order_R), torch.tensor(inverse_TK), COUNTS)


WHOLE = made([0, 1], [[0], [1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: perm.permute(z(2, 4), made([0, 2], [[0], [1]]), backend=b), "permute: the order holds 2, which is not 0 to 1"),
        (lambda b: perm.permute(z(2, 4), made([-1, 0], [[0], [1]]), backend=b), "permute: the order holds -1, which is not 0 to 1"),
        (lambda b: perm.permute(z(2, 4), made([2**62, 0], [[0], [1]]), backend=b), "permute: the order holds 4611686018427387904"),
        (lambda b: perm.combine(z(2, 4), made([0, 1], [[0], [2]]), backend=b), "combine: the order holds 2, which is not 0 to 1"),
        (lambda b: perm.combine(z(2, 4), made([0, 1], [[-1], [0]]), backend=b), "combine: the order holds -1, which is not 0 to 1"),
        (lambda b: perm.combine(z(1, 4), made([0], [[0], [2]]), backend=b), "combine: the order holds 2, which is not 0 to 1"),
        (lambda b: perm.combine(z(2, 4), made([0, 1], [[0], [2]]), z(2, 1), backend=b), "combine: the order holds 2"),
        (lambda b: perm.permute(z(2), WHOLE, backend=b), r"shapes \(2,\), \(2,\), \(2, 1\); they must be \[rows, width\], \[rows\] and"),
        (
            lambda b: perm.permute(z(2, 4), WHOLE._replace(order_R=z(2)), backend=b),
            "order of torch.float32 and inverse of torch.int64; both must be int64",
        ),
        (lambda b: perm.combine(z(2, 4), WHOLE._replace(inverse_TK=z(2, 1)), backend=b), "inverse of torch.float32"),
        (lambda b: perm.combine(z(2, 4).to("meta"), WHOLE, backend=b), "rows on meta and an order on cpu and cpu; use one device"),
        (
            lambda b: perm.combine(z(2, 4), WHOLE, z(2, 1).long(), backend=b),
            "weights of torch.int64 on cpu; they must be floating-point numbers on cpu",
        ),
        (lambda b: perm.combine(z(2, 4), WHOLE, z(2, 1).to("meta"), backend=b), "weights of torch.float32 on meta"),
    ],
)
@pytest.mark.parametrize("backend", implementations("permute"))
def test_orders_that_do_not_fit(backend: str, call: Callable[[str], Tensor], message: str) -> None:
    skip_unless_it_runs("permute", backend, "cpu")
    with pytest.raises(ValueError, match=message):
        call(backend)


@pytest.mark.parametrize("backend", implementations("permute"))
def test_a_wrong_order_is_found_in_the_backward_too(backend: str) -> None:
    """The forward of `combine` reads the inverse alone, its backward the order."""
    skip_unless_it_runs("permute", backend, "cpu")
    rows, weight = torch.ones(2, 4, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    y = perm.combine(rows, made([0, 7], [[0], [1]]), weight, backend=backend)
    with pytest.raises(ValueError, match="the order holds 7, which is not 0 to 1"):
        y.sum().backward()
