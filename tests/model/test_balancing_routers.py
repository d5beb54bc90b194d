"""The routers that balance themselves by quantiles, against their definitions written out token by token in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.model.moe.routers.histogram import BINS, count_scores, quantile
from megatron.model.moe.routers.quantile_balancing import QuantileBias
from tests.contracts.test_routers import EXPERTS, TOKENS, build, hidden
from tests.model.test_routers import logits, softmax
from tests.model.tiny_model import model_section, moe_section, tiny_model, tokens

ZEROS = torch.zeros(EXPERTS)


def many(tokens: int = 3000, seed: int = 0) -> Tensor:
    """Scores of experts that differ in place and width."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 4, EXPERTS) + torch.linspace(-3, 5, EXPERTS)


def load(router: Any, x_TD: Tensor) -> Tensor:
    return router(x_TD).expert_TK.flatten().bincount(minlength=EXPERTS + 1)[:EXPERTS]


def train_on(router: Any, x_TD: Tensor, steps: int, batches: int = 1) -> None:
    """Steps of one or more micro-batches over the same tokens."""
    for _ in range(steps):
        scores = torch.stack([router(part).scores_C for part in x_TD.chunk(batches)])
        router.balance.update_from_scores(scores.sum(0))


class TestHistogram:
    @pytest.mark.parametrize("share", [0.02, 1 / 6, 0.5, 0.9])
    def test_quantiles_are_near_from_far_and_exact_from_near(self, share: float) -> None:
        score_TE = many()
        exact_E = torch.from_numpy(np.quantile(score_TE.numpy(), 1 - share, axis=0))
        found_E = quantile(count_scores(score_TE, ZEROS), ZEROS, share)
        assert ((found_E - exact_E).abs() <= 0.1 * exact_E.abs() + 0.01).all(), "a wide bin far from the centre"
        again_E = quantile(count_scores(score_TE, found_E), found_E, share)
        third_E = quantile(count_scores(score_TE, again_E), again_E, share)
        torch.testing.assert_close((score_TE > third_E).double().mean(0), torch.full((EXPERTS,), share, dtype=torch.float64), rtol=0, atol=0.004)

    def test_parts_of_a_step_add_up(self) -> None:
        whole, parts = count_scores(many(), ZEROS), [count_scores(part, ZEROS) for part in many().split([1, 999, 2000])]
        assert torch.equal(whole, sum(parts))
        assert whole.view(-1, BINS).sum(1).tolist() == [3000] * EXPERTS

    def test_no_token_and_scores_beyond_all_bins(self) -> None:
        centre_E = torch.linspace(-1, 1, EXPERTS)
        nothing = count_scores(many(0), centre_E)
        assert torch.equal(quantile(nothing, centre_E, 0.5), centre_E.double())
        strange = count_scores(torch.tensor([[torch.inf] * EXPERTS, [-torch.inf] * EXPERTS, [torch.nan] * EXPERTS]), centre_E)
        assert strange.sum() == 3 * EXPERTS
        assert torch.isfinite(quantile(strange, centre_E, 0.3)).all()


class TestQuantileBalancing:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_the_bias_chooses_and_the_softmax_weighs(self, normalize: bool) -> None:
        router = build("quantile_balancing", moe_normalize_top_k=normalize, moe_router_topk_scaling_factor=2.5)
        router.balance.bias.copy_(torch.linspace(-0.9, 0.9, EXPERTS))
        routing, z = router(hidden()), logits(router)
        for t in range(TOKENS):
            best = np.argsort(-(z[t] + router.balance.bias.numpy()))[:2]
            assert routing.expert_TK[t].tolist() == best.tolist()
            weights = softmax(z[t])[best]
            np.testing.assert_allclose(routing.weight_TK[t].detach(), 2.5 * weights / (weights.sum() if normalize else 1), rtol=1e-5)

    @pytest.mark.parametrize("ema", [0.0, 0.75])
    def test_the_bias_is_megatron_core_s(self, ema: float) -> None:
        """`qb_dual_update` for one micro-batch, then the average, then centred."""
        balance, logit_TE = QuantileBias(EXPERTS, 2, ema), many(600).float() / 4
        balance.bias.copy_(torch.linspace(-1, 1, EXPERTS))
        before = balance.bias.numpy().astype(float)
        s, quota = logit_TE.numpy().astype(float), 600 * 2 // EXPERTS
        price = -before
        alpha = np.sort(s - price, axis=1)[:, -3]
        local = np.sort(s - alpha[:, None], axis=0)[-(quota + 1)]
        mixed = ema * price + (1 - ema) * local
        balance.update_from_scores(balance.count(logit_TE, balance(logit_TE)))
        np.testing.assert_allclose(balance.bias, -(mixed - mixed.mean()), atol=0.08)  # the nearest bins are 15 % of the distance wide
        assert abs(float(balance.bias.mean())) < 1e-6

    def test_the_load_becomes_even(self) -> None:
        router = build("quantile_balancing")
        x_TD = torch.randn(1200, 16, generator=torch.Generator().manual_seed(3)) + 1.0
        assert load(router, x_TD).max() > 1.5 * load(router, x_TD).float().mean()
        train_on(router, x_TD, 30)
        assert load(router, x_TD).max() < 1.1 * load(router, x_TD).float().mean()

    def test_micro_batches_do_not_matter_and_empty_steps_change_nothing(self) -> None:
        whole, parts = build("quantile_balancing"), build("quantile_balancing")
        x_TD = torch.randn(90, 16, generator=torch.Generator().manual_seed(3))
        train_on(whole, x_TD, 3)
        train_on(parts, x_TD, 3, batches=7)
        assert torch.equal(whole.balance.bias, parts.balance.bias)
        parts.balance.update_from_scores(torch.zeros(EXPERTS * BINS, dtype=torch.int64))
        assert torch.equal(whole.balance.bias, parts.balance.bias)


class TestExpertThreshold:
    def test_before_the_first_step_a_token_takes_its_best(self) -> None:
        router = build("expert_threshold")
        routing, z = router(hidden()), logits(router)
        for t in range(TOKENS):
            assert sorted(e for e in routing.expert_TK[t].tolist() if e < EXPERTS) == sorted(np.argsort(-z[t])[:2].tolist())

    def test_an_expert_takes_what_exceeds_its_threshold(self) -> None:
        router = build("expert_threshold")
        router.balance.threshold.copy_(torch.linspace(-1, 1, EXPERTS))
        router.balance.steps.fill_(1)
        routing, z = router(hidden()), logits(router)
        for t in range(TOKENS):
            for e in range(EXPERTS):
                taken = z[t, e] > router.balance.threshold[e].item()
                assert routing.expert_TK[t, e] == (e if taken else EXPERTS)
                np.testing.assert_allclose(routing.weight_TK[t, e].item(), taken / (1 + np.exp(-z[t, e])), rtol=1e-5)
        assert len({int(n) for n in (routing.expert_TK < EXPERTS).sum(1)}) > 1, "tokens take different numbers of experts"

    def test_the_average_has_no_bias_towards_its_start(self) -> None:
        balance = build("expert_threshold", moe_router_threshold_decay=0.75).balance
        wanted, total, weight = np.zeros(EXPERTS), np.zeros(EXPERTS), 0.0
        for step in range(4):
            scores_C = count_scores(many(seed=step), balance.threshold)
            newest = quantile(scores_C, balance.threshold, 2 / EXPERTS).numpy()
            total, weight = 0.75 * total + newest, 0.75 * weight + 1
            wanted = total / weight
            balance.update_from_scores(scores_C)
            np.testing.assert_allclose(balance.threshold, wanted, rtol=1e-5, atol=1e-6)
        assert balance.steps.item() == 4

    def test_experts_get_their_share_also_one_that_got_nothing(self) -> None:
        router = build("expert_threshold", moe_router_threshold_decay=0.5)
        x_TD = torch.randn(1200, 16, generator=torch.Generator().manual_seed(3)) + 1.0
        router.balance.steps.fill_(1)
        router.balance.threshold[2] = 50.0
        assert load(router, x_TD)[2] == 0
        train_on(router, x_TD, 25)
        torch.testing.assert_close(load(router, x_TD).double(), torch.full((EXPERTS,), 400.0, dtype=torch.float64), rtol=0.1, atol=0)

    def test_a_token_alone_gets_what_it_gets_among_others(self) -> None:
        router = build("expert_threshold")
        train_on(router, hidden(), 2)
        routing = router(hidden())
        for t in range(TOKENS):
            assert torch.equal(router(hidden()[t : t + 1]).expert_TK[0], routing.expert_TK[t])


@pytest.mark.parametrize(("name", "buffers"), [("quantile_balancing", {"bias"}), ("expert_threshold", {"threshold", "steps"})])
def test_state_is_saved_and_stays_in_float32(name: str, buffers: set[str]) -> None:
    router = build(name)
    train_on(router, hidden(), 1)
    router.to(torch.bfloat16)
    assert set(router.balance.state_dict()) == buffers
    assert all(value.dtype == torch.float32 for value in router.balance.state_dict().values())


@pytest.mark.parametrize("name", ["quantile_balancing", "expert_threshold"])
def test_a_model_hands_the_counts_to_each_layer(name: str) -> None:
    """Of layers with different numbers of experts too; outside training they are 0."""
    moe = moe_section(moe_num_experts=1, moe_num_experts_by_layer=[3, 5], moe_router_type=name)
    model, text = tiny_model(model_section(), moe), tokens()
    out = model(text[:, :-1], labels_BS=text[:, 1:])
    assert out.scores_XC.shape == (2, 5 * BINS)
    assert out.scores_XC.sum(1).tolist() == [3 * 16, 5 * 16], "every token counts once for every expert"
    before = [buffer.clone() for buffer in model.buffers()]
    model.update_balance(out.report.expert_load_XE, out.scores_XC)
    assert all(
        not torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True) if old.is_floating_point() and old.shape[0] in (3, 5)
    )
    assert not model.eval()(text[:, :-1], labels_BS=text[:, 1:]).scores_XC.any()
