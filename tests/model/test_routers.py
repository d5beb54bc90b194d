"""The routers against their papers' definitions, written out token by token in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.model.moe import LossContext
from megatron.model.moe.routers.linear import BalanceBias
from megatron.model.moe.routers.sinkhorn import sinkhorn
from tests.contracts.test_routers import EXPERTS, TOKENS, build, hidden


def logits(router: Any) -> np.ndarray:
    return (hidden().double() @ router.layer.weight.double().T).detach().numpy()


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_softmax_after_the_choice_is_mixtral_s(top_k: int) -> None:
    router = build("topk", moe_top_k=top_k, moe_router_pre_softmax=False)
    routing, z = router(hidden()), logits(router)
    for t in range(TOKENS):
        best = np.argsort(-z[t])[:top_k]
        assert routing.expert_TK[t].tolist() == best.tolist()
        np.testing.assert_allclose(routing.weight_TK[t].detach(), softmax(z[t][best]), rtol=1e-5)


def test_the_scaling_factor_multiplies_the_weights() -> None:
    plain, scaled = build("topk")(hidden()), build("topk", moe_router_topk_scaling_factor=2.5)(hidden())
    torch.testing.assert_close(scaled.weight_TK, 2.5 * plain.weight_TK)


def sinkhorn_by_loops(z: np.ndarray) -> tuple[np.ndarray, int]:
    """(preferences, rounds that were needed)."""
    cost = np.exp(z)
    column = [1 / (EXPERTS * sum(cost[t][e] for t in range(TOKENS))) for e in range(EXPERTS)]
    rounds = 0
    for _ in range(3):
        rounds += 1
        before = list(column)
        row = [1 / (TOKENS * (sum(column[e] * cost[t][e] for e in range(EXPERTS)) + 1e-8)) for t in range(TOKENS)]
        column = [1 / (EXPERTS * (sum(row[t] * cost[t][e] for t in range(TOKENS)) + 1e-8)) for e in range(EXPERTS)]
        if np.mean([abs(a - b) for a, b in zip(before, column, strict=True)]) < 1e-4:
            break
    return np.array([[column[e] * cost[t][e] * row[t] for e in range(EXPERTS)] for t in range(TOKENS)]), rounds


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_is_neox_s(top_k: int, training: bool) -> None:
    router = build("sinkhorn", moe_top_k=top_k).train(training)
    with torch.no_grad():
        router.layer.weight.mul_(20)  # logits far enough apart for the balancing to change the choice
    routing, z = router(hidden()), logits(router)
    activation = 1 / (1 + np.exp(-z)) if top_k == 1 else softmax(z)
    preference = sinkhorn_by_loops(z)[0] if training else activation
    for t in range(TOKENS):
        best = np.argsort(-preference[t])[:top_k]
        assert routing.expert_TK[t].tolist() == best.tolist()
        np.testing.assert_allclose(routing.weight_TK[t].detach(), activation[t][best], rtol=1e-4)
    plain = np.argsort(-activation)[:, :top_k]
    assert (routing.expert_TK.numpy() == plain).all() != training, "training has to balance the choice, inference must not"


@pytest.mark.parametrize(("scale", "rounds"), [(0.0, 1), (0.3, 1), (0.5, 2), (3.0, 3)])
def test_sinkhorn_stops_when_the_columns_hardly_move(scale: float, rounds: int) -> None:
    logit_TE = scale * torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted, taken = sinkhorn_by_loops(logit_TE.numpy())
    assert taken == rounds
    np.testing.assert_allclose(sinkhorn(logit_TE), wanted, rtol=1e-12)


@pytest.mark.parametrize(("groups", "of_them"), [(None, None), (3, 1), (3, 2), (2, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_is_deepseek_v3_s(normalize: bool, groups: int | None, of_them: int | None) -> None:
    keys = {} if groups is None else {"moe_router_num_groups": groups, "moe_router_group_topk": of_them}
    router = build("sigmoid", moe_normalize_top_k=normalize, moe_router_topk_scaling_factor=2.5, **keys)
    router.balance.bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    routing, score = router(hidden()), 1 / (1 + np.exp(-logits(router)))
    for t in range(TOKENS):
        preference = score[t] + router.balance.bias.numpy()
        allowed = list(range(EXPERTS))
        if groups is not None:
            members = [list(range(n * EXPERTS // groups, (n + 1) * EXPERTS // groups)) for n in range(groups)]
            rank = sorted(range(groups), key=lambda n: -sum(sorted(preference[members[n]])[-2:]))
            allowed = [e for n in rank[:of_them] for e in members[n]]
        best = sorted(allowed, key=lambda e: -preference[e])[:2]
        assert routing.expert_TK[t].tolist() == best
        wanted = score[t][best] / (score[t][best].sum() if normalize else 1)
        np.testing.assert_allclose(routing.weight_TK[t].detach(), 2.5 * wanted, rtol=1e-5)


def test_scores_that_all_vanish_have_weight_0() -> None:
    """Sigmoid of -200 is 0 in float32, and 0 / 0 would spread through the whole model."""
    router = build("sigmoid", moe_normalize_top_k=True)
    with torch.no_grad():
        router.layer.weight.copy_(-200 / 16 * torch.ones(EXPERTS, 16))
    routing = router(torch.ones(3, 16))
    assert not routing.weight_TK.any()
    routing.weight_TK.sum().backward()
    assert torch.isfinite(router.layer.weight.grad).all()


class TestBalanceBias:
    def test_it_moves_towards_the_mean_load(self) -> None:
        bias = BalanceBias(3, 0.25)
        bias.update(torch.tensor([5, 2, 2]))
        assert bias.bias.tolist() == [-0.25, 0.25, 0.25]
        bias.update(torch.tensor([3, 3, 3]))
        assert bias.bias.tolist() == [-0.25, 0.25, 0.25], "an even load moves nothing"

    def test_it_stays_in_float32(self) -> None:
        """In bf16 a bias of 0.5 could not take a step of 0.001."""
        bias = BalanceBias(2, 0.001)
        bias.bias.fill_(0.5)
        bias = bias.to(torch.bfloat16).half()
        bias.update(torch.tensor([0, 2]))
        assert bias.bias.dtype == torch.float32
        torch.testing.assert_close(bias.bias, torch.tensor([0.501, 0.499]), rtol=0, atol=1e-7)

    def test_an_overloaded_expert_loses_its_tokens(self) -> None:
        router = build("sigmoid", moe_top_k=1, moe_router_bias_update_rate=0.05)
        with torch.no_grad():
            router.layer.weight[0] += 3 * hidden().mean(0)
        loads = []
        for _ in range(60):
            loads.append(torch.bincount(router(hidden()).expert_TK.flatten(), minlength=EXPERTS))
            router.balance.update(loads[-1])
        assert loads[-1].max() < loads[0].max()


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.7, 1.0])
def test_top_p_takes_the_fewest_experts_that_reach_the_threshold(threshold: float) -> None:
    router = build("top_p", moe_router_top_p=threshold)
    with torch.no_grad():
        router.layer.weight.mul_(10)
    routing, p = router(hidden()), softmax(logits(router))
    for t in range(TOKENS):
        order, total, wanted = np.argsort(-p[t]), 0.0, []
        for e in order:
            if wanted and total >= threshold:
                break
            wanted.append(int(e))
            total += p[t][e]
        used = [e for e in routing.expert_TK[t].tolist() if e < EXPERTS]
        assert used == wanted[: len(used)]
        assert len(used) == len(wanted) or threshold == 1.0  # the last experts' share may vanish in float32
        np.testing.assert_allclose(routing.weight_TK[t, : len(used)].detach(), p[t][used], rtol=1e-4)


@pytest.mark.parametrize(("top_k", "capacity"), [(1, 2), (2, 5), (6, 14)])
def test_expert_choice_gives_every_expert_its_best_tokens(top_k: int, capacity: int) -> None:
    router = build("expert_choice", moe_top_k=top_k)
    routing, p = router(hidden()), softmax(logits(router))
    for e in range(EXPERTS):
        wanted = set(np.argsort(-p[:, e])[:capacity].tolist())
        took = {t for t in range(TOKENS) if e in routing.expert_TK[t].tolist()}
        assert took == wanted
        for t in took:
            assert routing.weight_TK[t, e].item() == pytest.approx(p[t, e], rel=1e-5)


def test_loss_context_defaults_stand_for_one_process() -> None:
    count = torch.tensor([1, 2])
    assert torch.equal(LossContext(2, 1).sum_over_processes(count), count)


def test_jitter_is_for_training_only() -> None:
    jittered, plain = build("sigmoid", moe_jitter_eps=0.1), build("sigmoid")
    torch.manual_seed(0)

    def z(router: Any) -> Tensor:
        return router(hidden()).logit_TE

    assert not torch.equal(z(jittered), z(plain))
    assert torch.equal(z(jittered.eval()), z(plain))
