"""The MoE layer's parts: the router, the losses, dispatch, and components registered from outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.config.components import UnknownComponent
from megatron.model.activations import UnknownActivation, activation_function
from megatron.model.initialization import Initializer, build_initializer
from megatron.model.moe import EXPERTS, LOSSES, ROUTERS, LossContext, MoELayer, Routing
from megatron.model.moe.dispatch.interface import Computed, Meanwhile
from megatron.model.moe.dispatch.local import LocalDispatcher
from megatron.model.moe.losses.load_balance import load_balance_loss
from megatron.model.moe.losses.z_loss import router_z_loss
from megatron.model.moe.routers.topk import TopKRouter
from tests.model.tiny_model import model_section, moe_section, tiny_model, tokens


def hidden(tokens: int = 10) -> Tensor:
    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0))


def router(**moe: object) -> TopKRouter:
    return TopKRouter(model_section(), moe_section(**moe), build_initializer(model_section(), 2))


@pytest.mark.parametrize("normalize", [False, True])
def test_topk_router(normalize: bool) -> None:
    routing = router(moe_top_k=2, moe_normalize_top_k=normalize)(hidden())
    probability = routing.logit_TE.detach().numpy().astype(np.float64)
    probability = np.exp(probability) / np.exp(probability).sum(1, keepdims=True)
    np.testing.assert_allclose(routing.probability_TE.detach(), probability, rtol=1e-5)
    for t in range(10):
        chosen = np.argsort(-probability[t])[:2]
        assert routing.expert_TK[t].tolist() == chosen.tolist()
        wanted = probability[t, chosen] / (probability[t, chosen].sum() if normalize else 1)
        np.testing.assert_allclose(routing.weight_TK[t].detach(), wanted, rtol=1e-5)


def test_router_arithmetic_is_float32_whatever_the_dtype() -> None:
    routing = router().to(torch.bfloat16)(hidden().to(torch.bfloat16))
    assert routing.logit_TE.dtype == routing.probability_TE.dtype == routing.weight_TK.dtype == torch.float32


def test_jitter_is_for_training_only() -> None:
    jittered, plain = router(moe_jitter_eps=0.1), router()
    torch.manual_seed(0)
    assert not torch.equal(jittered(hidden()).logit_TE, plain(hidden()).logit_TE)
    assert torch.equal(jittered.eval()(hidden()).logit_TE, plain(hidden()).logit_TE)


def routing_of(expert_TK: Tensor, logit_TE: Tensor) -> Routing:
    probability_TE = logit_TE.softmax(-1)
    return Routing(expert_TK, probability_TE.gather(1, expert_TK), probability_TE, logit_TE)


@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_against_double_loops(top_k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logit_TE = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    routing = routing_of(logit_TE.topk(top_k).indices, logit_TE)
    logits, probability = logit_TE.detach().numpy(), routing.probability_TE.detach().numpy()
    balance = z_loss = 0.0
    for e in range(4):
        chosen = sum(int(routing.expert_TK[t, k]) == e for t in range(7) for k in range(top_k))
        balance += 4 * (chosen / (7 * top_k)) * sum(probability[t, e] for t in range(7)) / 7
    for t in range(7):
        z_loss += np.log(sum(np.exp(logits[t, e]) for e in range(4))) ** 2 / 7
    context = LossContext(num_experts=4, top_k=top_k)
    np.testing.assert_allclose(load_balance_loss(routing, context).item(), balance, rtol=1e-12)
    np.testing.assert_allclose(router_z_loss(routing, context).item(), z_loss, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda logit: load_balance_loss(routing_of(routing.expert_TK, logit), context), (logit_TE,))
    assert torch.autograd.gradcheck(lambda logit: router_z_loss(routing_of(routing.expert_TK, logit), context), (logit_TE,))


def test_load_balance_is_one_when_uniform_and_e_when_collapsed() -> None:
    context = LossContext(num_experts=4, top_k=1)
    uniform = routing_of(torch.arange(8)[:, None] % 4, torch.zeros(8, 4))
    collapsed = routing_of(torch.zeros(8, 1, dtype=torch.int64), torch.tensor([[50.0, 0, 0, 0]]).expand(8, 4))
    assert load_balance_loss(uniform, context).item() == pytest.approx(1)
    assert load_balance_loss(collapsed, context).item() == pytest.approx(4)


def test_dispatch_and_back() -> None:
    dispatcher = LocalDispatcher(moe_section(moe_top_k=2))
    routing = router(moe_top_k=2)(hidden())
    rows_RD, plan = dispatcher.dispatch(hidden(), routing)
    assert plan.rows_E.sum() == len(rows_RD) == 20
    torch.testing.assert_close(dispatcher.combine(rows_RD, plan), hidden() * routing.weight_TK.sum(1, keepdim=True))


class OnlyRun:
    """A dispatcher from outside: three arguments, no base class."""

    def __init__(self, dispatcher: LocalDispatcher, said: list[str]) -> None:
        self.dispatcher, self.said = dispatcher, said

    def run(self, x_TD: Tensor, routing: Routing, experts: Any) -> Computed:
        self.said.append("run")
        return self.dispatcher.run(x_TD, routing, experts)


class AlsoWaits(OnlyRun):
    """One that waits for something."""

    def run_while(self, x_TD: Tensor, routing: Routing, experts: Any, meanwhile: Meanwhile) -> Computed:
        self.said.append("send")
        meanwhile()
        return self.run(x_TD, routing, experts)


@pytest.mark.parametrize(("kind", "order"), [(OnlyRun, ["run", "shared"]), (AlsoWaits, ["send", "shared", "run"])])
def test_a_dispatcher_from_outside(kind: type[OnlyRun], order: list[str]) -> None:
    moe, said = moe_section(moe_expert_type="grouped", moe_top_k=2, moe_num_shared_experts=1), list[str]()
    layer = MoELayer(model_section(), moe, build_initializer(model_section(), 2))
    expected = layer(hidden(12).view(2, 6, 16)).y_BSD
    layer.dispatcher = kind(LocalDispatcher(moe), said)
    (beside,) = layer.beside
    beside.register_forward_pre_hook(lambda *_: said.append("sum"))
    branch = beside.branch
    beside.branch = lambda x_TD: said.append("shared") or branch(x_TD)
    torch.testing.assert_close(layer(hidden(12).view(2, 6, 16)).y_BSD, expected)
    assert said == [*order, "sum"]


def test_moe_layer_is_the_sum_over_experts() -> None:
    layer = MoELayer(model_section(), moe_section(moe_expert_type="grouped", moe_top_k=2), build_initializer(model_section(), 2))
    x_BSD = hidden(12).view(2, 6, 16)
    out = layer(x_BSD)
    routing, w1, w2 = layer.router(hidden(12)), layer.experts.mlp.w1.view(3, 24, 16), layer.experts.mlp.w2.view(3, 24, 16)
    for t in range(12):
        wanted = sum(
            weight * nn.functional.gelu(hidden(12)[t] @ w1[e].T) @ w2[e] for e, weight in zip(routing.expert_TK[t], routing.weight_TK[t], strict=True)
        )
        torch.testing.assert_close(out.y_BSD.flatten(0, 1)[t], wanted, rtol=1e-4, atol=1e-5)
    assert out.aux_losses_A.shape == (2,)
    assert out.lore_load_G.shape == (0,)


def without_waiting() -> list[tuple[str, str, bool]]:
    """Routers, experts, and whether LoREs are routed. Other routers have to know on the host how many rows there are."""
    routers = [name for name in ROUTERS if name not in ("top_p", "expert_choice", "expert_threshold", "smoe_dropout")]
    return [*((router, experts, True) for router in routers for experts in EXPERTS), ("topk", "structmoe", False)]


@pytest.mark.parametrize(("router_type", "experts", "routed"), without_waiting())
def test_nothing_waits_for_the_device(router_type: str, experts: str, routed: bool) -> None:
    """Forward, every loss, loads, statistics and backward with tensors that have shapes and no numbers: reading one on the host raises."""
    losses = dict.fromkeys(LOSSES if experts == "structmoe" and routed else [name for name in LOSSES if name != "lore_balance"], 0.1)
    section = moe_section(moe_router_type=router_type, moe_expert_type=experts, moe_lore_routed=routed, moe_losses=losses, moe_top_k=2)
    with FakeTensorMode():
        layer = MoELayer(model_section(), section, build_initializer(model_section(), 2))
        out = layer(torch.randn(2, 6, 16))
        (out.y_BSD.sum() + out.aux_losses_A.sum()).backward()
    assert out.aux_losses_A.shape == (len(losses),)
    assert (out.expert_load_E.shape, out.statistics.shape) == ((3,), (5,))


class ToyRouter(nn.Module):
    """Sends token t to expert t modulo E with a learned weight."""

    def __init__(self, model: object, moe: object, init: Initializer) -> None:
        super().__init__()
        self.num_experts = moe.moe_num_experts  # type: ignore[attr-defined]
        self.gate = nn.Parameter(torch.ones(self.num_experts))

    def forward(self, x_TD: Tensor) -> Routing:
        expert_TK = torch.arange(len(x_TD))[:, None] % self.num_experts
        logit_TE = self.gate.expand(len(x_TD), -1)
        return Routing(expert_TK, self.gate[expert_TK], logit_TE.softmax(-1), logit_TE)


def toy_loss(routing: Routing, context: LossContext) -> Tensor:
    return routing.weight_TK.square().mean() * context.num_experts


def test_a_router_and_a_loss_from_outside_train_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "toy", ToyRouter)
    monkeypatch.setitem(LOSSES, "toy", toy_loss)
    model = tiny_model(moe=moe_section(moe_router_type="toy", moe_losses={"toy": 0.5}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        out = model(tokens()[:, :-1], labels_BS=tokens()[:, 1:])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[1] < losses[0]
    assert out.report.expert_load_XE.tolist() == [[6, 5, 5], [6, 5, 5]]


def test_an_unknown_component_says_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "toy", ToyRouter)
    section = moe_section(moe_router_type="toy")
    monkeypatch.delitem(ROUTERS, "toy")
    with pytest.raises(UnknownComponent, match=r"unknown name 'toy'.*known: .*topk"):
        tiny_model(moe=section)


def test_an_unknown_activation_says_what_is_known() -> None:
    with pytest.raises(UnknownActivation, match="activation = 'gelu_new': must be one of bilinear, geglu, gelu"):
        activation_function("gelu_new")
