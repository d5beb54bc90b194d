"""The op `route`: every implementation against a definition written out row by row, values and gradients, at every edge.

Shapes as in `megatron/kernels/route/__init__.py`: N rows; C candidates; K choices; P parents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron.kernels import route as op
from megatron.kernels.permute import sort_by_group
from megatron.kernels.route import Routed, Selection, choice_statistics, route
from megatron.testing.devices import DEVICES
from tests.contracts.comparing import implementations, skip_unless_it_runs

BACKENDS = implementations("route")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
DTYPES = {dtype: torch.promote_types(dtype, torch.float32) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
SIZES = {
    "one of four": (9, 4, 1, None),
    "two of seven": (70, 7, 2, None),
    "all of five": (6, 5, 5, None),
    "one candidate": (5, 1, 1, None),
    "wider than a vector": (67, 37, 3, None),
    "no rows": (0, 4, 2, None),
    "one row": (1, 3, 2, None),
    "LoREs": (12, 4, 1, [5, 0, 3, 4]),
    "all LoREs": (9, 3, 3, [4, 5]),
    "one LoRE": (4, 1, 1, [1, 0, 3]),
    "all rows of one expert": (7, 5, 2, [0, 7, 0]),
    "experts without rows": (0, 4, 2, [0, 0]),
}
"""N, C, K and the rows of each parent."""


def logits(rows: int, candidates: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return (2 * torch.randn(rows, candidates, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(device, dtype)


def counts(rows: list[int] | None, device: str = "cpu") -> Tensor | None:
    return None if rows is None else torch.tensor(rows, device=device)


def parents_of(rows: list[int] | None, total: int) -> list[int]:
    return [0] * total if rows is None else [p for p, count in enumerate(rows) for _ in range(count)]


def definition(logit_NC: Tensor, selection: Selection, rows: list[int] | None) -> tuple[list[Tensor], list[list[int]]]:
    """(weights, probabilities, logsumexp, totals, entropy; the choices), a row at a time, for rows without ties and NaN."""
    weights, probabilities, sums, entropies, choices = [], [], [], [], []
    totals = [torch.zeros(logit_NC.shape[1], dtype=logit_NC.dtype, device=logit_NC.device) for _ in rows or [0]]
    for x, parent in zip(logit_NC, parents_of(rows, len(logit_NC)), strict=True):
        shifted = (x - x.max().detach()).exp()
        p = shifted / shifted.sum()
        choice = sorted(range(len(x)), key=lambda c: -x[c].item())[: selection.top_k]
        chosen = p[choice]
        weights.append(selection.scale * (chosen / chosen.sum() if selection.normalize else chosen))
        probabilities.append(p)
        sums.append(x.max().detach() + shifted.sum().log())
        entropies.append(-(p * torch.where(p > 0, p, 1).log()).sum())
        choices.append(choice)
        totals[parent] = totals[parent] + p
    empty = 0 * logit_NC
    rows_of = [torch.stack(parts) if parts else empty[:, : selection.top_k] for parts in (weights, probabilities)]
    probability = rows_of[1] if probabilities else empty
    mean = torch.stack(entropies).mean() if entropies else logit_NC.new_zeros(())
    return [rows_of[0], probability, torch.stack(sums) if sums else empty.sum(-1), torch.stack(totals) + empty.sum(), mean], choices


def numbers(routed: Routed) -> list[Tensor]:
    return [routed.weight_NK, routed.probability_NC, routed.logsumexp_N, routed.total_PC]


def gradient(values: list[Tensor], logit: Tensor, kept: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    """Of a sum of all values with random factors."""
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value) for value in values]
    (grad,) = torch.autograd.grad(sum((values[i] * factors[i]).sum() for i in kept), logit, retain_graph=True)
    return grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend: str, size: tuple[int, int, int, list[int] | None], normalize: bool, dtype: torch.dtype, device: str) -> None:
    skip_unless_it_runs("route", backend, device)
    rows, candidates, top_k, rows_P = size
    selection, tolerance = Selection(top_k, normalize, 1.5), TOLERANCE[DTYPES[dtype]]
    logit = logits(rows, candidates, dtype, device).requires_grad_()
    wide = logit.detach().double().requires_grad_()
    routed = route(logit, selection, counts(rows_P, device), backend=backend)
    wanted, choices = definition(wide, selection, rows_P)
    for got, right in zip([*numbers(routed), routed.entropy], wanted, strict=True):
        assert got.dtype == DTYPES[dtype]
        torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)
    assert routed.choice_NK.tolist() == choices
    assert not routed.entropy.requires_grad
    got_grad, right_grad = gradient(numbers(routed), logit), gradient(wanted[:4], wide)
    assert got_grad.dtype == dtype
    rounded = 1e-2 if dtype == torch.bfloat16 else 4 * tolerance
    torch.testing.assert_close(got_grad.double(), right_grad, rtol=rounded, atol=rounded)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_is_the_stable_order_by_key(backend: str, size: tuple[int, int, int, list[int] | None]) -> None:
    skip_unless_it_runs("route", backend, "cpu")
    rows, candidates, top_k, rows_P = size
    routed = route(logits(rows, candidates), Selection(top_k), counts(rows_P), backend=backend)
    groups = candidates * len(rows_P or [0])
    keys = [parent * candidates + c for parent, choice in zip(parents_of(rows_P, rows), routed.choice_NK.tolist(), strict=True) for c in choice]
    by_key = sorted(range(rows * top_k), key=lambda i: keys[i])
    order = routed.order
    assert order.order_R.tolist() == by_key
    assert order.inverse_TK.shape == (rows, top_k)
    assert [by_key[place] for place in order.inverse_TK.flatten().tolist()] == list(range(rows * top_k))
    assert order.rows_G.tolist() == [keys.count(g) for g in range(groups)]
    assert {t.dtype for t in (routed.choice_NK, *order)} == {torch.int64}


@pytest.mark.parametrize("rows_P", [None, [300, 0, 211]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_on_several_threads(backend: str, rows_P: list[int] | None) -> None:
    """As many as make the compiled implementation use its threads; what it computes does not depend on their number."""
    skip_unless_it_runs("route", backend, "cpu")
    logit, selection = logits(511, 64, torch.float32).requires_grad_(), Selection(8, normalize=True)
    wide = logit.detach().double().requires_grad_()
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            routed = route(logit, selection, counts(rows_P), backend=backend)
            outcomes.append([*numbers(routed), routed.choice_NK, *routed.order, gradient(numbers(routed), logit)])
    finally:
        torch.set_num_threads(threads)
    wanted, choices = definition(wide, selection, rows_P)
    for outcome in outcomes:
        assert outcome[4].tolist() == choices
        for got, right in zip([*outcome[:4], outcome[-1]], [*wanted[:4], gradient(wanted[:4], wide)], strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
    for one, other in pairwise(outcomes):
        for i in (0, 1, 2, 4, 5, 6, 7, 8):
            assert torch.equal(one[i], other[i])


@pytest.mark.parametrize("kept", [(0,), (1,), (2,), (3,), (0, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_nobody_asks_for_may_be_absent(backend: str, kept: tuple[int, ...]) -> None:
    skip_unless_it_runs("route", backend, "cpu")
    logit, selection, rows_P = logits(9, 5).requires_grad_(), Selection(2, normalize=True), [4, 5]
    routed = route(logit, selection, counts(rows_P), backend=backend)
    wanted, _ = definition(logit, selection, rows_P)
    torch.testing.assert_close(gradient(numbers(routed), logit, kept), gradient(wanted[:4], logit, kept))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_logits_the_lowest_number_is_chosen_first(backend: str, top_k: int, device: str) -> None:
    skip_unless_it_runs("route", backend, device)
    logit = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 1.0, 3.0], [0.0, -0.0, 1.0, -0.0], [-torch.inf, 5.0, -torch.inf, -torch.inf]], device=device
    )
    routed = route(logit, Selection(top_k), backend=backend)
    assert routed.choice_NK.tolist() == [row[:top_k] for row in ([0, 1, 2, 3], [1, 3, 0, 2], [2, 0, 1, 3], [1, 0, 2, 3])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_choices_are_those_of_topk(backend: str) -> None:
    skip_unless_it_runs("route", backend, "cpu")
    logit = logits(300, 16, torch.float32)
    assert torch.equal(route(logit, Selection(4), backend=backend).choice_NK, logit.softmax(-1).topk(4, dim=-1).indices)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_and_infinitely_small_logits(backend: str, dtype: torch.dtype) -> None:
    """Nothing overflows, and a candidate that is ruled out gets no gradient."""
    skip_unless_it_runs("route", backend, "cpu")
    logit = torch.tensor([[1e30, 0.0, -1e30], [-torch.inf, -200.0, -201.0], [3e38, 3e38, -3e38]], dtype=dtype).requires_grad_()
    routed = route(logit, Selection(2, normalize=True), backend=backend)
    share = 1 / (1 + math.exp(-1))
    assert routed.choice_NK.tolist() == [[0, 1], [1, 2], [0, 1]]
    torch.testing.assert_close(routed.probability_NC, logit.new_tensor([[1, 0, 0], [0, share, 1 - share], [0.5, 0.5, 0]]))
    torch.testing.assert_close(routed.logsumexp_N, logit.new_tensor([1e30, -200 + math.log(1 + math.exp(-1)), 3e38]))
    grad = gradient([*numbers(routed)[:2], routed.logsumexp_N, routed.total_PC], logit)
    assert torch.isfinite(grad).all()
    assert grad[1, 0] == 0


NOT_NUMBERS = {"NaN": [1.0, torch.nan, 2.0], "inf": [torch.inf, 1.0, 2.0], "all ruled out": [-torch.inf] * 3, "only NaN": [torch.nan] * 3}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", NOT_NUMBERS.values(), ids=NOT_NUMBERS.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_probabilities(backend: str, row: list[float], device: str) -> None:
    """An error where it is not allowed. Where it is, its own numbers are NaN and its choices are in range; other rows are as they would be."""
    skip_unless_it_runs("route", backend, device)
    logit = torch.tensor([[0.5, 0.1, 0.2], row, [0.3, 0.2, 0.1]], device=device)
    with pytest.raises(ValueError, match=r"route: 1 of 3 rows have no probabilities, because a logit is NaN or \+inf, or all are -inf"):
        route(logit, Selection(2), backend=backend)
    for rows_P in (None, [1, 2]):
        for selection in (Selection(1), Selection(2, normalize=True), Selection(3)):
            routed = route(logit, selection, counts(rows_P, device), allow_nan=True, backend=backend)
            for value in (routed.weight_NK[1], routed.probability_NC[1], routed.logsumexp_N[1:2], routed.total_PC[-1], routed.entropy):
                assert value.isnan().all()
            choice = routed.choice_NK[1].tolist()
            assert len(set(choice)) == len(choice)
            assert set(choice) <= {0, 1, 2}
            assert sorted(routed.order.order_R.tolist()) == list(range(3 * selection.top_k))
            others = route(logit[[0, 2]], selection, backend=backend)
            torch.testing.assert_close(routed.weight_NK[[0, 2]], others.weight_NK)
            assert torch.equal(routed.choice_NK[[0, 2]], others.choice_NK)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_strides(backend: str) -> None:
    skip_unless_it_runs("route", backend, "cpu")
    base = logits(6, 20).requires_grad_()
    given = {"turned": base.t(), "every other": base[:, ::2], "the same": base[:1].expand(6, 20)}
    for name, logit in given.items():
        routed, plain = (route(x, Selection(2), backend=backend) for x in (logit, logit.contiguous()))
        grads = [gradient(numbers(each), base) for each in (routed, plain)]
        assert torch.equal(grads[0], grads[1]), name
        assert torch.equal(routed.order.order_R, plain.order.order_R), name


@pytest.mark.parametrize("rows_P", [None, [2, 0, 3]])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize: bool, rows_P: list[int] | None) -> None:
    def compute(logit: Tensor) -> tuple[Tensor, ...]:
        return tuple(numbers(route(logit, Selection(2, normalize, 0.7), counts(rows_P), backend="reference")))

    assert torch.autograd.gradcheck(compute, logits(5, 4).requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_keeps_pytorch_rules(backend: str) -> None:
    """Schema, fake tensors and autograd registration, as torch checks them."""
    skip_unless_it_runs("route", backend, "cpu")
    logit = logits(6, 4).requires_grad_()
    for rows_P in (None, torch.tensor([2, 4])):
        torch.library.opcheck(op._route.overload, (logit, rows_P, 2, True, 1.5, False, backend))
    torch.library.opcheck(op._statistics.overload, (torch.tensor([[0, 1], [2, 0]]), 3, 2, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile(backend: str) -> None:
    """One graph, forward and backward."""
    skip_unless_it_runs("route", backend, "cpu")
    logit, rows_P = logits(8, 4).requires_grad_(), torch.tensor([3, 5])

    def compute(logit: Tensor) -> Tensor:
        routed = route(logit, Selection(2, normalize=True), rows_P, allow_nan=True, backend=backend)
        statistics = choice_statistics(routed.choice_NK, 4, 4, backend=backend)
        return routed.weight_NK.square().sum() + routed.logsumexp_N.sum() + statistics.sum() + routed.order.rows_G.sum()

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logit), compute(logit))
    (got,), (wanted,) = (torch.autograd.grad(f(logit), logit) for f in (compiled, compute))
    torch.testing.assert_close(got, wanted)


CHOICES = {
    "one each": ([[0], [0], [1], [2], [2], [2]], 3),
    "two each": ([[0, 1], [1, 0], [2, 1], [2, 3], [0, 1], [2, 3]], 3),
    "with empty places": ([[0, 4], [4, 4], [1, 0], [0, 1], [3, 2], [1, 4]], 2),
    "sequences of one": ([[0], [1], [2], [3], [0], [1]], 1),
    "no tokens": ([], 3),
}


@pytest.mark.parametrize("case", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_choice_statistics(backend: str, case: tuple[list[list[int]], int]) -> None:
    """By hand: experts of a token and of the one before it, as sets."""
    skip_unless_it_runs("route", backend, "cpu")
    chosen, length = case
    sets = [set(choice) - {4} for choice in chosen]
    different = sum(len(sets[t] ^ sets[t - 1]) for t in range(len(sets)) if t % length)
    used = sum(map(len, sets))
    wanted = [(different // 2) / max(1, used * (length - 1) / length), used / max(1, len(sets))]
    choice_TK = torch.tensor(chosen).view(len(chosen), -1) if chosen else torch.zeros(0, 2, dtype=torch.int64)
    got = choice_statistics(choice_TK, 4, length, backend=backend)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("backend", implementations("permute"))
def test_sorting_groups_as_torch_does(backend: str) -> None:
    """The counting sort, also with threads and empty places."""
    skip_unless_it_runs("permute", backend, "cpu")
    generator = torch.Generator().manual_seed(5)
    for tokens, top_k, groups, padded in [(0, 2, 3, False), (7, 3, 1, False), (9000, 2, 37, False), (9000, 1, 5, True), (4, 2, 0, True)]:
        group_TK = torch.randint(groups + padded, (tokens, top_k), generator=generator)
        order = sort_by_group(group_TK, groups, padded=padded, backend=backend)
        flat = group_TK.flatten()
        routed = int((flat < groups).sum())
        by_group = torch.sort(flat, stable=True).indices
        assert torch.equal(order.order_R, by_group[:routed])
        assert torch.equal(order.rows_G, torch.bincount(flat, minlength=groups)[:groups])
        places = torch.empty_like(flat)
        places[by_group] = torch.arange(len(flat)).clamp(max=routed)
        assert torch.equal(order.inverse_TK.flatten(), places)


def z(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda b: route(z(3), Selection(1), backend=b),
            r"logits \(3,\) of torch.float32; they must be floating-point numbers, \[rows, candidates\]",
        ),
        (lambda b: route(z(3, 2).long(), Selection(1), backend=b), r"logits \(3, 2\) of torch.int64"),
        (lambda b: route(z(3, 2), Selection(3), backend=b), "3 choices among 2 candidates; choose at least 1 and at most all"),
        (lambda b: route(z(3, 2), Selection(0), backend=b), "0 choices among 2 candidates"),
        (lambda b: route(z(3, 0), Selection(1), backend=b), "1 choices among 0 candidates"),
        (lambda b: route(z(3, 2), Selection(1), torch.tensor([1, 1]), backend=b), "row counts .*3"),
        (lambda b: route(z(3, 2), Selection(1), torch.tensor([2, 2]), backend=b), "row counts .*3"),
        (lambda b: route(z(3, 2), Selection(1), torch.tensor([5, -2]), backend=b), "row counts .*"),
        (lambda b: route(z(3, 2), Selection(1), torch.tensor([2**62, 2**62, 2**62, 2**62, 3]), backend=b), "row counts .*"),
        (lambda b: route(z(3, 2), Selection(1), z(1), backend=b), "row counts .* of torch.float32; they must be int64, one for each parent"),
        (lambda b: route(z(3, 2), Selection(1), torch.tensor([[3]]), backend=b), r"row counts \(1, 1\)"),
        (lambda b: route(z(3, 2), Selection(1), torch.zeros(1, dtype=torch.int64, device="meta"), backend=b), "logits on cpu and row counts on meta"),
        (lambda b: choice_statistics(torch.tensor([[0], [3]]), 2, 2, backend=b), "a choice is not 0 to 1, or 2 for an empty place"),
        (lambda b: choice_statistics(torch.tensor([[0], [-1]]), 2, 2, backend=b), "a choice is not 0 to 1, or 2 for an empty place"),
        (lambda b: choice_statistics(torch.tensor([[0], [1]]), 2, 0, backend=b), "2 tokens cannot be cut into sequences of 0"),
        (lambda b: choice_statistics(torch.tensor([[0], [1], [1]]), 2, 2, backend=b), "3 tokens cannot be cut into sequences of 2"),
        (lambda b: choice_statistics(z(2, 1), 2, 2, backend=b), "they must be int64"),
        (lambda b: choice_statistics(torch.tensor([[0]]), -1, 1, backend=b), "for -1 experts"),
        (lambda b: sort_by_group(torch.tensor([[0, -1]]), 2, backend=b), "there is no group -1; groups are 0 to 1"),
        (lambda b: sort_by_group(torch.tensor([[0, 2]]), 2, backend=b), "there is no group 2; groups are 0 to 1$"),
        (
            lambda b: sort_by_group(torch.tensor([[0, 3]]), 2, padded=True, backend=b),
            "there is no group 3; groups are 0 to 1, or 2 for an empty choice",
        ),
        (lambda b: sort_by_group(torch.tensor([[2**62]]), 2, padded=True, backend=b), "there is no group 4611686018427387904"),
        (lambda b: sort_by_group(z(2, 1), 2, backend=b), "of torch.float32 for 2 groups; they must be int64"),
        (lambda b: sort_by_group(torch.tensor([0, 1]), 2, backend=b), r"groups \(2,\)"),
        (lambda b: sort_by_group(torch.tensor([[0]]), -1, backend=b), "for -1 groups"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_refused_in_a_sentence(backend: str, call: Callable[[str], object], message: str) -> None:
    skip_unless_it_runs("route", backend, "cpu")
    with pytest.raises(ValueError, match=message):
        call(backend)
