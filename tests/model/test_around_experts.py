"""What stands around the experts, against its definition: the projections of latent MoE, and zero, copy and constant experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config.size import count_parameters
from megatron.model.initialization import build_initializer
from megatron.model.moe import LossContext, MoELayer, Routing
from megatron.model.moe.losses.heterogeneous_load_balance import heterogeneous_load_balance_loss
from megatron.model.moe.losses.load_balance import load_balance_loss
from tests.model.tiny_model import VOCAB, model_section, moe_section, tiny_model, tokens

WIDTH, BATCH, LENGTH = 16, 2, 20
ALL_KINDS: dict[str, Any] = {"moe_zero_experts": 1, "moe_copy_experts": 2, "moe_constant_experts": 2}


def layer(**moe: Any) -> MoELayer:
    section = moe_section(**{"moe_num_experts": 4, "moe_top_k": 2, "moe_expert_type": "grouped", **moe})
    return MoELayer(model_section(), section, build_initializer(model_section(), 5))


def hidden() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))


def one_expert(experts: Any, expert: int, row_D: Tensor) -> Tensor:
    """What one expert with weights makes of one row."""
    rows_E = torch.zeros(experts.num_experts, dtype=torch.int64)
    rows_E[expert] = 1
    output: Tensor = experts(row_D[None], rows_E)[0][0]
    return output


# ---------------------------------------------------------------- latent MoE


@pytest.mark.parametrize("kind", ["grouped", "structmoe", "decomposed"])
def test_latent_experts_read_and_write_through_the_projections(kind: str) -> None:
    moe = layer(moe_latent_size=6, moe_expert_type=kind)
    x_TD, got = hidden().flatten(0, 1), moe(hidden())
    routing, down, up = moe.router(x_TD), moe.latent.down.weight, moe.latent.up.weight
    for t in range(0, BATCH * LENGTH, 7):
        z = sum(routing.weight_TK[t, k] * one_expert(moe.experts, int(routing.expert_TK[t, k]), down @ x_TD[t]) for k in range(2))
        torch.testing.assert_close(got.y_BSD.flatten(0, 1)[t], up @ z, rtol=1e-4, atol=1e-6)


def test_router_and_shared_expert_read_the_whole_hidden_state() -> None:
    moe = layer(moe_latent_size=6, moe_num_shared_experts=1)
    assert moe.router.layer.weight.shape[1] == WIDTH
    with torch.no_grad():
        moe.latent.up.weight.zero_()
    torch.testing.assert_close(moe(hidden()).y_BSD, moe.beside[0].mlp(hidden()))


def test_without_a_latent_size_nothing_is_there() -> None:
    assert not [name for name in layer().state_dict() if "latent" in name or "zero_computation" in name]


# ---------------------------------------------------------------- zero, copy and constant experts


@pytest.mark.parametrize("kinds", [ALL_KINDS, {"moe_zero_experts": 2}, {"moe_copy_experts": 1}, {"moe_constant_experts": 3}], ids=str)
@pytest.mark.parametrize("router", ["topk", "sigmoid", "top_p", "smoe_dropout"])
def test_every_expert_gives_what_its_definition_says(router: str, kinds: dict[str, int]) -> None:
    moe = layer(moe_router_type=router, **({"moe_router_start_k": 2} if router == "smoe_dropout" else {}), **kinds)
    x_TD, got = hidden().flatten(0, 1), moe(hidden())
    routing = moe.router(x_TD)
    zero, copy = kinds.get("moe_zero_experts", 0), kinds.get("moe_copy_experts", 0)
    for t in range(0, BATCH * LENGTH, 3):
        expected = torch.zeros(WIDTH)
        for expert, weight in zip(routing.expert_TK[t].tolist(), routing.weight_TK[t], strict=True):
            if expert < 4:
                expected = expected + weight * one_expert(moe.experts, expert, x_TD[t])
            elif 4 + zero <= expert < 4 + zero + copy:
                expected = expected + weight * x_TD[t]
            elif expert >= 4 + zero + copy and expert < 4 + sum(kinds.values()):
                number = expert - 4 - zero - copy
                a = (moe.zero_computation.mixture.weight[2 * number : 2 * number + 2] @ x_TD[t]).softmax(0)
                expected = expected + weight * (a[0] * x_TD[t] + a[1] * moe.zero_computation.vector[number])
        torch.testing.assert_close(got.y_BSD.flatten(0, 1)[t], expected, rtol=1e-4, atol=1e-6)


class Counting(nn.Module):
    """Experts that note how many rows they are given."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts, self.rows = experts, 0

    def forward(self, x_RD: Tensor, rows_E: Tensor) -> Any:
        self.rows += len(x_RD)
        assert int(rows_E.sum()) == len(x_RD)
        return self.experts(x_RD, rows_E)


def test_only_choices_of_experts_with_weights_become_rows() -> None:
    moe = layer(**ALL_KINDS)
    moe.experts = Counting(moe.experts)
    output = moe(hidden())
    chosen = output.decision.routing.expert_TK
    assert output.expert_load_E.tolist() == torch.bincount(chosen.flatten(), minlength=9).tolist()
    assert moe.experts.rows == int((chosen < 4).sum()) < chosen.numel()


def test_statistics_count_all_experts() -> None:
    moe = layer(**ALL_KINDS)
    with torch.no_grad():
        moe.router.layer.weight.zero_()
        moe.router.layer.weight[4:6] = 100 * hidden().flatten(0, 1).sign().mean(0)  # the same two experts, or the other ones, for every token
    output = moe(hidden())
    chosen = output.decision.routing.expert_TK.view(BATCH, LENGTH, 2)
    changed = [len(set(b[s].tolist()) - set(b[s - 1].tolist())) for b in chosen for s in range(1, LENGTH)]
    assert output.statistics[1].item() == pytest.approx(sum(changed) / len(changed) / 2)
    assert output.statistics[2].item() == 2


def test_tokens_without_an_expert_with_weights_are_fine() -> None:
    moe = layer(**ALL_KINDS, moe_expert_type="structmoe")
    with torch.no_grad():
        moe.router.layer.weight[:4] = -1000 * hidden().flatten(0, 1).mean(0)
        moe.router.layer.weight[4:] = 0
    x_BSD = hidden().mean((0, 1), keepdim=True).expand(1, 3, WIDTH).contiguous().requires_grad_()
    output = moe(x_BSD)
    output.y_BSD.square().sum().backward()
    assert output.expert_load_E[:4].sum() == 0
    assert output.lore_load_G.sum() == 0
    assert x_BSD.grad is not None
    assert torch.isfinite(x_BSD.grad).all()
    lores = output.decision.chosen().lore_TKL
    assert lores is not None
    assert (lores == -1).all()


def test_lores_are_told_of_the_tokens_that_have_some() -> None:
    output = layer(**ALL_KINDS, moe_expert_type="structmoe", moe_losses={"lore_balance": 0.1})(hidden())
    chosen = output.decision.chosen()
    assert chosen.lore_TKL is not None
    assert torch.equal((chosen.lore_TKL >= 0).all(-1), chosen.expert_TK < 4)
    assert output.lore_load_G.sum() == (chosen.expert_TK < 4).sum()
    assert 1 <= output.aux_losses_A[0] <= 4


# ---------------------------------------------------------------- the loss


def routing() -> Routing:
    logit_TE = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 0.0, 2.0], [1.5, 0.0, 1.0]])
    return Routing(logit_TE.topk(1).indices, torch.ones(4, 1), logit_TE.softmax(-1), logit_TE)


def test_the_loss_by_hand() -> None:
    """Choices 0, 1, 2, 0: f = 1/2, 1/4, 1/4. The last expert needs no product, with tau = 0.5."""
    probability = routing().logit_TE.softmax(-1).mean(0).tolist()
    by_hand = 3 * (1 * 0.5 * probability[0] + 1 * 0.25 * probability[1] + 0.5 * 0.25 * probability[2])
    context = LossContext(3, 1, num_zero_computation=1, zero_computation_balance=0.5)
    assert heterogeneous_load_balance_loss(routing(), context).item() == pytest.approx(by_hand)


def test_with_tau_1_the_loss_is_load_balance() -> None:
    context = LossContext(3, 1, num_zero_computation=1, zero_computation_balance=1.0)
    torch.testing.assert_close(heterogeneous_load_balance_loss(routing(), context), load_balance_loss(routing(), context))


# ---------------------------------------------------------------- sizes and gradients


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    "moe",
    [
        {"moe_latent_size": 6},
        {"moe_latent_size": 6, "moe_expert_type": "decomposed", "moe_expert_bias": True},
        {"moe_latent_size": 10, "moe_lore_interaction": "standalone", "moe_num_shared_experts": 1},
        {**ALL_KINDS, "moe_losses": {"heterogeneous_load_balance": 0.1}},
        {**ALL_KINDS, "moe_latent_size": 6, "moe_expert_type": "grouped"},
        {"moe_router_type": "smoe_dropout", "moe_top_k": 3, "moe_router_start_k": 2},
    ],
    ids=str,
)
def test_parameters_are_those_that_the_configuration_says_and_all_of_them_learn(moe: dict[str, Any], activation: str) -> None:
    model, section = model_section(activation=activation, seq_length=32, max_position_embeddings=32), moe_section(**{"moe_top_k": 2, **moe})
    gpt, text = tiny_model(model, section), tokens(8, 33)
    assert sum(parameter.numel() for parameter in gpt.parameters()) == count_parameters(model, section, VOCAB).total_sum
    gpt(text[:, :-1], labels_BS=text[:, 1:]).loss.backward()
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
