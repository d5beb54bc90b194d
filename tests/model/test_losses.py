"""Auxiliary losses against definitions written as double loops in NumPy; gradients by gradcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.config.components import LOSSES, resolve_component
from megatron.model.moe import LoreRouting, LossContext, Routing

B, S, E, M = 3, 5, 4, 3
T = B * S


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routing_of(logit_TE: Tensor, top_k: int, expert_TK: Tensor | None = None) -> Routing:
    probability_TE = logit_TE.softmax(-1)
    expert_TK = logit_TE.topk(top_k).indices if expert_TK is None else expert_TK
    return Routing(expert_TK, probability_TE.gather(1, expert_TK), probability_TE, logit_TE, batch_shape=(B, S))


def loss(name: str, routing: Routing, **context: Any) -> Tensor:
    cheap: dict[str, Any] = {"num_zero_computation": 2, "zero_computation_balance": 0.3} if name == "heterogeneous_load_balance" else {}
    return resolve_component(LOSSES, name)(routing, LossContext(E, routing.expert_TK.shape[1], **cheap, **context))


def p_of(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def load_balance(z: np.ndarray, chosen: list[list[int]], tokens: range, eta: tuple[float, ...] = (1.0,) * E) -> float:
    total = 0.0
    for e in range(E):
        f = sum(e in chosen[t] for t in tokens) / sum(len(chosen[t]) for t in tokens)
        total += E * eta[e] * f * sum(p_of(z[t])[e] for t in tokens) / len(tokens)
    return total


def block_wise(z: np.ndarray, chosen: list[list[int]], tau: float, k: int) -> float:
    """CoSMoEs, equations 2 to 7."""
    w = p_of(tau * z)
    hard, soft = 0, 0.0
    for b in range(B):
        for t in range(b * S, b * S + S - 1):
            for e in range(E):
                hard += abs(int(e in chosen[t + 1]) - int(e in chosen[t]))
                soft += abs(w[t + 1][e] - w[t][e])
    return (hard // 2) / (B * k * (S - 1)) * soft / (B * S)


def neighbours(z: np.ndarray, chosen: list[list[int]]) -> float:
    """The mean of -log p over the choices of each token's neighbours in its sequence."""
    costs = []
    for t in range(T):
        for other in (t - 1, t + 1):
            if 0 <= other < T and other // S == t // S:
                costs += [-np.log(p_of(z[t])[e]) for e in chosen[other]]
    return float(np.mean(costs))


DEFINITIONS: dict[str, Callable[[np.ndarray, list[list[int]], int], float]] = {
    "load_balance": lambda z, chosen, k: load_balance(z, chosen, range(T)),
    "sequence_load_balance": lambda z, chosen, k: sum(load_balance(z, chosen, range(b * S, (b + 1) * S)) for b in range(B)) / B,
    "global_load_balance": lambda z, chosen, k: load_balance(z, chosen, range(T)),
    "heterogeneous_load_balance": lambda z, chosen, k: load_balance(z, chosen, range(T), eta=(1.0, 1.0, 0.3, 0.3)),
    "joint_load_balance": lambda z, chosen, k: sum(map(len, chosen)) / T * load_balance(z, chosen, range(T)),
    "block_wise_selection": lambda z, chosen, k: block_wise(z, chosen, 1.0, k),
    "neighbour_selection": lambda z, chosen, k: neighbours(z, chosen),
    "entropy": lambda z, chosen, k: -sum(p * np.log(p) for t in range(T) for p in p_of(z[t])) / T,
    "z_loss": lambda z, chosen, k: sum(np.log(sum(np.exp(z[t]))) ** 2 for t in range(T)) / T,
}


def test_every_loss_has_a_definition_here() -> None:
    assert set(DEFINITIONS) | {"lore_balance"} == set(LOSSES)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_loss_is_its_definition(name: str, top_k: int) -> None:
    logit_TE = draw(T, E).requires_grad_()
    routing = routing_of(logit_TE, top_k)
    wanted = DEFINITIONS[name](logit_TE.detach().numpy(), routing.expert_TK.tolist(), top_k)
    np.testing.assert_allclose(loss(name, routing).item(), wanted, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: loss(name, routing_of(z, top_k, routing.expert_TK)), (logit_TE,))


@pytest.mark.parametrize("tau", [0.5, 4.0])
def test_the_temperature_of_block_wise_selection(tau: float) -> None:
    logit_TE = draw(T, E)
    routing = routing_of(logit_TE, 2)
    wanted = block_wise(logit_TE.numpy(), routing.expert_TK.tolist(), tau, 2)
    assert loss("block_wise_selection", routing, temperature=tau).item() == pytest.approx(wanted, rel=1e-12)


class TestBlockWiseSelection:
    def test_constant_experts_cost_nothing(self) -> None:
        assert loss("block_wise_selection", routing_of(torch.tensor([[2.0, 1, 0, 0]]).double().expand(T, E), 2)).item() == 0

    def test_the_hard_part_is_floored_and_carries_no_gradient(self) -> None:
        """One token that changes one of its two experts there and back: H = 4, half of it 2."""
        expert_TK = torch.tensor([[0, 1]] * T)
        expert_TK[1] = torch.tensor([0, 2])
        logit_TE = draw(T, E).requires_grad_()
        value = loss("block_wise_selection", routing_of(logit_TE, 2, expert_TK))
        w = p_of(logit_TE.detach().numpy()).reshape(B, S, E)
        soft = np.abs(np.diff(w, axis=1)).sum() / (B * S)
        assert value.item() == pytest.approx(2 / (B * 2 * (S - 1)) * soft)

    def test_sequences_do_not_meet(self) -> None:
        """The same experts within each sequence, others in the next: no replacement."""
        expert_TK = torch.arange(B).repeat_interleave(S)[:, None]
        assert loss("block_wise_selection", routing_of(draw(T, E), 1, expert_TK)).item() == 0

    def test_a_sequence_of_one_token_costs_nothing(self) -> None:
        routing = routing_of(draw(T, E), 1)._replace(batch_shape=(T, 1))
        assert loss("block_wise_selection", routing).item() == 0


class TestNeighbourSelection:
    def test_the_same_experts_for_all_cost_log_k_and_equal_logits_cost_log_e(self) -> None:
        same_TE = torch.tensor([[50.0, 50, 0, 0]]).double().expand(T, E)
        assert loss("neighbour_selection", routing_of(same_TE, 2)).item() == pytest.approx(np.log(2))
        assert loss("neighbour_selection", routing_of(torch.zeros(T, E).double(), 2)).item() == pytest.approx(np.log(E))

    def test_the_temperature_multiplies_the_logits(self) -> None:
        logit_TE = draw(T, E)
        chosen = routing_of(logit_TE, 2).expert_TK
        hot = loss("neighbour_selection", routing_of(logit_TE, 2, chosen), temperature=3.0)
        assert hot.item() == pytest.approx(neighbours(3 * logit_TE.numpy(), chosen.tolist()))

    def test_a_sequence_of_one_token_costs_nothing(self) -> None:
        assert loss("neighbour_selection", routing_of(draw(T, E), 1)._replace(batch_shape=(T, 1))).item() == 0


def test_balance_within_each_sequence_is_stricter_than_over_all() -> None:
    """The cheat that the paper describes: each sequence uses one expert, all together are even."""
    expert_TK = (torch.arange(T) // S % 2)[:, None]
    logit_TE = torch.zeros(T, E, dtype=torch.float64).scatter_(1, expert_TK, 20.0)
    routing = routing_of(logit_TE[: 2 * S], 1)._replace(batch_shape=(2, S))
    assert loss("load_balance", routing).item() == pytest.approx(2, abs=1e-5)
    assert loss("sequence_load_balance", routing).item() == pytest.approx(4, abs=1e-5)


def test_the_global_loss_counts_earlier_micro_batches_and_other_processes() -> None:
    routing = routing_of(draw(T, E), 1)
    own = torch.bincount(routing.expert_TK.flatten(), minlength=E)
    others, earlier = torch.tensor([9, 0, 0, 1]), torch.tensor([0, 4, 4, 4])
    got = loss("global_load_balance", routing, earlier_rows_E=earlier, sum_over_processes=lambda count: count + others)
    share = (own + others + earlier).double() / (own + others + earlier).sum()
    assert got.item() == pytest.approx(E * float((share * routing.probability_TE.mean(0)).sum()))


@pytest.mark.parametrize("name", ["load_balance", "sequence_load_balance", "global_load_balance", "joint_load_balance", "heterogeneous_load_balance"])
def test_scores_that_do_not_sum_to_one_are_divided_by_their_sum(name: str) -> None:
    logit_TE = draw(T, E)
    routing = routing_of(logit_TE, 2)
    scores = routing._replace(probability_TE=3 * routing.probability_TE)
    torch.testing.assert_close(loss(name, scores), loss(name, routing))


@pytest.mark.parametrize("name", ["load_balance", "sequence_load_balance", "global_load_balance", "joint_load_balance", "block_wise_selection"])
def test_empty_places_are_no_choice(name: str) -> None:
    """Token t uses 1 + t % 2 experts."""
    logit_TE = draw(T, E)
    routing = routing_of(logit_TE, 2)
    expert_TK = routing.expert_TK.clone()
    expert_TK[::2, 1] = E
    chosen = [[e for e in row if e < E] for row in expert_TK.tolist()]
    padded = routing._replace(expert_TK=expert_TK, padded=True)
    z, k = logit_TE.numpy(), sum(map(len, chosen)) / T
    wanted = block_wise(z, chosen, 1.0, 1) / k if name == "block_wise_selection" else DEFINITIONS[name](z, chosen, 2)
    assert loss(name, padded).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ["sequence_load_balance", "block_wise_selection"])
def test_a_routing_without_sequences_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: the routing has no batch_shape"):
        loss(name, routing_of(draw(T, E), 1)._replace(batch_shape=None))


def lores_of(logit_RM: Tensor, rows_E: Tensor, top_l: int, lore_RL: Tensor | None = None) -> LoreRouting:
    probability_RM = logit_RM.softmax(-1)
    lore_RL = logit_RM.topk(top_l).indices if lore_RL is None else lore_RL
    first_R = (torch.arange(len(rows_E)) * M).repeat_interleave(rows_E)
    rows_G = torch.bincount((lore_RL + first_R[:, None]).flatten(), minlength=len(rows_E) * M)
    return LoreRouting(lore_RL, probability_RM.gather(1, lore_RL), probability_RM, logit_RM, rows_G)


@pytest.mark.parametrize("top_l", [1, 2])
def test_lore_balance_is_switch_s_inside_each_expert(top_l: int) -> None:
    rows_E, logit_RM = torch.tensor([4, 0, 7, 1]), draw(12, M).requires_grad_()
    lores, routing = lores_of(logit_RM, rows_E, top_l), routing_of(draw(T, E), 1)
    wanted, first = 0.0, 0
    for rows in rows_E.tolist():
        own = range(first, first + rows)
        for m in range(M):
            f = sum(m in lores.lore_RL[r].tolist() for r in own) / max(1, rows * top_l)
            probability = sum(float(lores.probability_RM[r, m].detach()) for r in own) / max(1, rows)
            wanted += rows / 12 * M * f * probability
        first += rows
    assert loss("lore_balance", routing, lores=lores, rows_E=rows_E).item() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda z: loss("lore_balance", routing, lores=lores_of(z, rows_E, top_l, lores.lore_RL), rows_E=rows_E), (logit_RM,)
    )


def test_lore_balance_without_lores_is_refused() -> None:
    with pytest.raises(ValueError, match="lore_balance: these experts have no routed LoREs"):
        loss("lore_balance", routing_of(draw(T, E), 1), rows_E=torch.tensor([T, 0, 0, 0]))
