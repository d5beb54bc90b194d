"""Operators called without the dispatcher: the same values and gradients, and whoever listens still sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.kernels import operator
from megatron.kernels.operator import Operator, torch_operator
from tests.contracts.comparing import draw


@torch_operator("neox_test::weighted")
def weighted(x: Tensor, parts: list[Tensor], flags: list[bool], scale: float, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    total = x * scale
    for part, flag in zip(parts, flags, strict=True):
        total = total + part if flag else total
    return total if extra is None else total + extra, torch.tensor(len(parts))


@torch_operator("neox_test::opaque")
def opaque(x: Tensor) -> Tensor:
    return x + 1


@torch.library.register_fake("neox_test::weighted")
def _(x: Tensor, parts: list[Tensor], flags: list[bool], scale: float, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty((), dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, ctx.parts, ctx.flags, ctx.scale, ctx.extra = inputs
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    parts = [grad.clone() if flag and needed else None for flag, needed in zip(ctx.flags, ctx.needs_input_grad[1], strict=True)]
    return grad * ctx.scale, parts, None, None, None if ctx.extra is None else grad.clone()


weighted.differentiate(_save, _backward)


@pytest.fixture(params=["direct", "through the dispatcher"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "direct":
        monkeypatch.setattr(operator, "_watched", lambda: True)


class Listening(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("with_extra", [False, True])
def test_both_ways_give_the_same_gradients(with_extra: bool) -> None:
    x, parts, extra = draw(3), [draw(3, seed=1), draw(3, seed=2), draw(3, seed=3).detach()], draw(3, seed=4) if with_extra else None
    y, count = weighted(x, parts, [True, False, True], 2.0, extra)
    torch.testing.assert_close(y, 2 * x + parts[0] + parts[2] + (0 if extra is None else extra))
    assert count.item() == 3
    assert not count.requires_grad
    wanted = [x, *parts[:2], *([] if extra is None else [extra])]
    for _ in range(2):  # the graph is kept: nothing of it may be used up
        grads = torch.autograd.grad(y.sum(), wanted, retain_graph=True, allow_unused=True)
        assert [None if g is None else g.tolist() for g in grads] == [[2.0] * 3, [1.0] * 3, None, *([[1.0] * 3] if with_extra else [])]


@pytest.mark.usefixtures("_way")
def test_without_gradients_nothing_is_kept() -> None:
    x = draw(3)
    with torch.no_grad():
        assert not weighted(x, [], [], 1.0, None)[0].requires_grad
    assert not weighted(x.detach(), [x.detach()], [True], 1.0, None)[0].requires_grad


def test_differentiating_twice_is_an_error() -> None:
    """Torch itself warns and goes on with a wrong gradient where an operator has none."""
    x = draw(3)
    (grad,) = torch.autograd.grad(weighted(x, [], [], 2.0, None)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_whoever_listens_sees_the_operator() -> None:
    with Listening() as listening:
        weighted(draw(3), [], [], 1.0, None)
    assert "neox_test.weighted.default" in listening.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        weighted(draw(3), [], [], 1.0, None)
    assert "neox_test::weighted" in {event.key for event in profile.key_averages()}
    assert weighted(torch.empty(3, device="meta"), [], [], 1.0, None)[0].is_meta
    compiled = torch.compile(lambda x: weighted(x, [x], [True], 2.0, None)[0] * 2, fullgraph=True, backend="aot_eager")
    x = draw(3)
    torch.testing.assert_close(compiled(x), 6 * x)
    torch.testing.assert_close(torch.func.vmap(lambda x: opaque(x))(x.detach()), x + 1)


def test_plain_calls_do_not_pass_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above compare one way with itself."""
    for each in (weighted, opaque):
        monkeypatch.setattr(each, "overload", None)
    x = torch.nn.Parameter(torch.ones(3))
    assert isinstance(weighted, Operator)
    weighted(x, [], [], 2.0, None)[0].sum().backward()
    assert x.grad is not None
    assert opaque(x.detach()).tolist() == [2.0] * 3


def test_opcheck() -> None:
    torch.library.opcheck(weighted.overload, (draw(3), [draw(3, seed=1)], [True], 2.0, None))
