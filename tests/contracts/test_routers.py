"""Every registered router: what dispatch, losses and analysis rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config import routers
from megatron.config.components import ROUTERS, resolve_component
from megatron.model.initialization import build_initializer
from megatron.model.moe import Routing
from megatron.model.moe.dispatch.local import LocalDispatcher
from tests.model.tiny_model import model_section, moe_section

EXPERTS, TOKENS = 6, 14
OPTIONS: dict[str, dict[str, Any]] = {"smoe_dropout": {"moe_router_start_k": 2}}
"""What a router needs so that its weights say something: those of one expert alone would be 1."""


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def build(name: str, **moe: Any) -> nn.Module:
    section = moe_section(
        **{"moe_num_experts": EXPERTS, "moe_top_k": 2, "moe_router_type": name, "moe_expert_type": "grouped", **OPTIONS.get(name, {}), **moe}
    )
    return resolve_component(ROUTERS, name)(model_section(), section, build_initializer(model_section(), 2))


def chosen(routing: Routing) -> Tensor:
    """True where the token uses the expert."""
    table = torch.zeros(TOKENS, EXPERTS + 1, dtype=torch.bool).scatter_(1, routing.expert_TK, True)
    return table[:, :EXPERTS]


def test_every_router_has_its_options_class() -> None:
    assert set(routers.OPTIONS) == set(ROUTERS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_shapes_and_arithmetic(name: str, dtype: torch.dtype, training: bool) -> None:
    routing = build(name).to(dtype).train(training)(hidden(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    assert routing.expert_TK.dtype == torch.int64
    assert routing.expert_TK.shape == routing.weight_TK.shape
    assert routing.logit_TE.shape == routing.probability_TE.shape == (TOKENS, EXPERTS)
    assert routing.logit_TE.dtype == routing.probability_TE.dtype == routing.weight_TK.dtype == wide
    assert ((routing.probability_TE >= 0) & (routing.probability_TE <= 1)).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_no_expert_twice_and_empty_places_weigh_nothing(name: str) -> None:
    routing = build(name)(hidden())
    empty = routing.expert_TK == EXPERTS
    assert routing.padded or not empty.any()
    assert (routing.expert_TK >= 0).all()
    assert (routing.expert_TK <= EXPERTS).all()
    assert not routing.weight_TK[empty].any()
    assert (routing.weight_TK[~empty] > 0).all()
    assert torch.equal(chosen(routing).sum(1), (~empty).sum(1)), "an expert stands twice in one token's choice"


@pytest.mark.parametrize("name", ROUTERS)
def test_the_choice_carries_no_gradient_and_the_weights_do(name: str) -> None:
    router, x_TD = build(name), hidden().requires_grad_()
    routing = router(x_TD)
    routing.weight_TK.square().sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.any()
    for parameter_name, parameter in router.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", ROUTERS)
def test_a_token_s_routing_does_not_depend_on_its_place(name: str) -> None:
    """Over the same tokens in another order, each gets what it got."""
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    router = build(name)
    assert torch.equal(chosen(router(hidden()[order])), chosen(router(hidden()))[order])


@pytest.mark.parametrize("name", ROUTERS)
def test_dispatch_and_back_weighs_every_choice(name: str) -> None:
    """With experts that do nothing, a token gets itself back, times the sum of its weights; nothing is dropped."""
    routing = build(name)(hidden())
    dispatcher = LocalDispatcher(moe_section(moe_num_experts=EXPERTS))
    rows_RD, plan = dispatcher.dispatch(hidden(), routing)
    assert torch.equal(plan.rows_E, chosen(routing).sum(0))
    assert len(rows_RD) == plan.rows_E.sum()
    torch.testing.assert_close(dispatcher.combine(rows_RD, plan), hidden() * routing.weight_TK.sum(1, keepdim=True))


@pytest.mark.parametrize("name", ROUTERS)
def test_one_token(name: str) -> None:
    routing = build(name).eval()(hidden()[:1])
    assert (routing.expert_TK < EXPERTS).any()
