"""The CUDA kernels of `route` on the emulated GPU: every contract of the op, what wrong counts do, and the counting sort.

On the emulated GPU a call also fails if a kernel races or touches memory that is not its own. On a real GPU the contract tests run by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron.kernels import route as op
from megatron.kernels.permute import sort_by_group
from megatron.kernels.registry import Implementation
from megatron.kernels.route import Selection, route
from megatron.kernels.route.cuda import MOST_GROUPS, Cuda
from tests.contracts import test_route as contract
from tests.csrc.building import emulated


@pytest.fixture(autouse=True)
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated GPU as another implementation for tensors of the CPU."""
    entry = Implementation("emulated", frozenset({"cpu"}), lambda: None, lambda: Cuda(emulated()))
    monkeypatch.setattr(op.OP, "_known", {**op.OP._known, "emulated": entry})


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the reference computed what the kernels are to compute")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", contract.SIZES.values(), ids=contract.SIZES.keys())
def test_values_and_gradients(
    size: tuple[int, int, int, list[int] | None], normalize: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("forward", "backward"):
        monkeypatch.setattr(op.Reference, name, refuse)
    contract.test_values_and_gradients("emulated", size, normalize, dtype, "cpu")


@pytest.mark.parametrize("size", contract.SIZES.values(), ids=contract.SIZES.keys())
def test_the_order(size: tuple[int, int, int, list[int] | None], monkeypatch: pytest.MonkeyPatch) -> None:
    made = contract.logits
    monkeypatch.setattr(contract, "logits", lambda rows, candidates: made(rows, candidates, torch.float32))
    contract.test_the_order_is_the_stable_order_by_key("emulated", size)


@pytest.mark.parametrize("kept", [(0,), (1,), (2,), (3,), (0, 2)])
def test_a_gradient_that_nobody_asks_for_may_be_absent(kept: tuple[int, ...]) -> None:
    logit, selection, rows_P = contract.logits(9, 5, torch.float32).requires_grad_(), Selection(2, normalize=True), [4, 5]
    routed = route(logit, selection, contract.counts(rows_P), backend="emulated")
    wanted, _ = contract.definition(logit, selection, rows_P)
    torch.testing.assert_close(
        contract.gradient(contract.numbers(routed), logit, kept), contract.gradient(wanted[:4], logit, kept), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_of_equal_logits_the_lowest_number_is_chosen_first(top_k: int) -> None:
    contract.test_of_equal_logits_the_lowest_number_is_chosen_first("emulated", top_k, "cpu")


@pytest.mark.parametrize("row", contract.NOT_NUMBERS.values(), ids=contract.NOT_NUMBERS.keys())
def test_a_row_without_probabilities(row: list[float]) -> None:
    contract.test_a_row_without_probabilities("emulated", row, "cpu")


def test_the_choices_of_rows_without_probabilities_are_those_of_the_reference() -> None:
    """NaN counts as the largest; of two the first."""
    nan, inf = torch.nan, torch.inf
    logit = torch.tensor([[1.0, nan, inf, 2.0, -nan], [-inf, -inf, nan, -1.0, inf], [-inf] * 5, [nan] * 5, [-0.0, 0.0, 1.0, -0.0, 0.0]])
    for top_k in range(1, 6):
        got, wanted = (route(logit, Selection(top_k), allow_nan=True, backend=name) for name in ("emulated", "reference"))
        assert torch.equal(got.choice_NK, wanted.choice_NK)
        assert torch.equal(got.order.order_R, wanted.order.order_R)


OTHERS: dict[str, Callable[[], None]] = {
    "choices are those of topk": lambda: contract.test_choices_are_those_of_topk("emulated"),
    "huge and infinitely small": lambda: contract.test_huge_and_infinitely_small_logits("emulated", torch.float32),
    "strides": lambda: contract.test_logits_of_any_strides("emulated"),
    "torch's rules": lambda: contract.test_the_op_keeps_pytorch_rules("emulated"),
    "torch.compile": lambda: contract.test_torch_compile("emulated"),
    "rows over several tiles": lambda: contract.test_many_rows_on_several_threads("emulated", [300, 0, 211]),
}


@pytest.mark.parametrize("check", OTHERS.values(), ids=OTHERS.keys())
def test_the_other_contracts(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("counts", "message"), [([1, 1], "row counts .*3"), ([5, -2], "row counts .*"), ([2**62] * 4 + [3], "row counts .*")])
def test_wrong_counts_on_the_cpu_are_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(3, 2), Selection(1), torch.tensor(counts), backend="emulated")


BAD_COUNTS = {"too many": [4, 9, 2], "huge": [1 << 62, 1 << 62, 1 << 62], "negative": [-3, 4, -(1 << 62)], "too few": [1, 0, 2], "no parents": []}


@pytest.mark.parametrize("counts", BAD_COUNTS.values(), ids=BAD_COUNTS.keys())
def test_wrong_counts_on_the_device_touch_nothing_else(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """There a count cannot be checked without a wait. It is cut off; the choices of rows without a parent stand behind all others."""
    monkeypatch.setattr("megatron.kernels.route.cuda.check_rows", lambda rows_P, total: None)
    logit = contract.logits(6, 4, torch.float32).requires_grad_()
    routed = route(logit, Selection(2, normalize=True), torch.tensor(counts, dtype=torch.int64), backend="emulated")
    left, parents = 6, []
    for parent, count in enumerate(counts):
        parents += [parent] * max(0, min(count, left))
        left = 6 - len(parents)
    keys = [parent * 4 + c for parent, row in zip([*parents, *[len(counts)] * left], routed.choice_NK.tolist(), strict=True) for c in row]
    outside = [key if key < 4 * len(counts) else 4 * len(counts) for key in keys]
    assert routed.order.order_R.tolist() == sorted(range(12), key=lambda i: outside[i])
    assert routed.order.rows_G.tolist() == [keys.count(g) for g in range(4 * len(counts))]
    wanted = torch.zeros(len(counts), 4)
    for row, parent in enumerate(parents):
        wanted[parent] += routed.probability_NC[row].detach()
    torch.testing.assert_close(routed.total_PC, wanted)
    assert contract.gradient(contract.numbers(routed), logit).isfinite().all()


def test_more_groups_than_a_block_counts_are_the_references() -> None:
    logit, rows_P = contract.logits(3, 5, torch.float32), torch.zeros(MOST_GROUPS // 5 + 1, dtype=torch.int64)
    rows_P[-1] = 3
    got, wanted = (route(logit, Selection(2), rows_P, backend=name) for name in ("emulated", "reference"))
    assert torch.equal(got.order.order_R, wanted.order.order_R)
    assert torch.equal(got.order.rows_G, wanted.order.rows_G)


@pytest.mark.parametrize(("count", "groups"), [(0, 3), (1, 1), (31, 4), (2500, 7), (1024, 300)])
def test_counting_sort(count: int, groups: int) -> None:
    keys = torch.randint(groups, (count, 1), generator=torch.Generator().manual_seed(0))
    for got, wanted in zip(Cuda(emulated()).sort(keys, groups), sort_by_group(keys, groups, backend="reference"), strict=True):
        assert torch.equal(got, wanted)


def test_keys_that_no_group_has_stand_behind_all_others() -> None:
    got = Cuda(emulated()).sort(torch.tensor([[2], [-1], [0], [3], [1], [10**12], [0]]), 3)
    assert got.order_R.tolist() == [2, 6, 4, 0, 1, 3, 5]
    assert got.inverse_TK.flatten().tolist() == [3, 4, 0, 5, 2, 6, 1]
    assert got.rows_G.tolist() == [2, 1, 1]
