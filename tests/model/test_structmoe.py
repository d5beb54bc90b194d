"""StructMoE experts against equation 2 of the paper written out token by token, and against plain experts when the LoREs are silent.

Shapes: R rows; E experts; M LoREs per expert; Q rank; D model width; F expert width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.model.activations import activation_function
from megatron.model.initialization import build_initializer
from megatron.model.moe.experts.grouped import GroupedExperts
from megatron.model.moe.experts.structmoe import StructMoEExperts, build_structmoe
from tests.model.tiny_model import model_section, moe_section, tiny_model, tokens

ROWS = [5, 0, 4]


def build(dtype: torch.dtype = torch.float64, activation: str = "gelu", **moe: Any) -> StructMoEExperts:
    model = model_section(activation=activation)
    return build_structmoe(model, moe_section(**moe), build_initializer(model, 3)).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sum(ROWS), 16, generator=torch.Generator().manual_seed(0), dtype=dtype)


def equation_2(experts: StructMoEExperts, x_RD: Tensor, activation: str, choices: int, *, normalize: bool) -> Tensor:
    """H = x W_up + sum_i (x pi_i A_i) B_i for each row, then activation and down-projection."""
    lores, width_in = experts.lores, x_RD.shape[1]
    count_e, count_m, rank = lores.num_experts, lores.per_expert, lores.rank
    router_EMD = lores.router.view(count_e, count_m, width_in)
    a_EMQD, b_EMQF = lores.a.view(count_e, count_m, rank, width_in), lores.b.view(count_e, count_m, rank, -1)
    act, weights = activation_function(activation), {name: w.view(count_e, -1, width_in) for name, w in experts.mlp.named_parameters()}
    out, first = [], 0
    for e, rows in enumerate(ROWS):
        for x_D in x_RD[first : first + rows]:
            pi_M = torch.softmax(router_EMD[e] @ x_D, 0)
            chosen = sorted(range(count_m), key=lambda m: -pi_M[m].item())[:choices]
            total = sum(pi_M[m] for m in chosen) if normalize else 1
            h_F = weights["w1"][e] @ x_D
            for m in chosen:
                h_F = h_F + ((pi_M[m] / total) * (a_EMQD[e, m] @ x_D)) @ b_EMQF[e, m]
            hidden_F = act(h_F) if "w3" not in weights else act(weights["w3"][e] @ x_D) * h_F
            out.append(hidden_F @ weights["w2"][e])
        first += rows
    return torch.stack(out)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "swiglu", "geglu", "reglu"])
@pytest.mark.parametrize(("choices", "normalize"), [(1, False), (2, False), (2, True), (4, False)])
def test_equation_2(choices: int, normalize: bool, activation: str) -> None:
    experts = build(activation=activation, moe_lore_top_k=choices, moe_lore_normalize=normalize)
    x_RD = inputs()
    y_RD, routing = experts(x_RD, torch.tensor(ROWS))
    wanted = equation_2(experts, x_RD, activation, choices, normalize=normalize)
    torch.testing.assert_close(y_RD, wanted, rtol=0, atol=1e-10)
    assert routing.lore_RL.shape == (sum(ROWS), choices)
    assert routing.rows_G.sum() == sum(ROWS) * choices
    grads = torch.autograd.grad(y_RD.square().sum(), list(experts.parameters()))
    for got, expected in zip(grads, torch.autograd.grad(wanted.square().sum(), list(experts.parameters())), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("choices", [1, 2])
def test_gradcheck_of_the_input(choices: int) -> None:
    experts = build(moe_lore_top_k=choices)
    assert torch.autograd.gradcheck(lambda x: experts(x, torch.tensor(ROWS))[0], (inputs().requires_grad_(),))


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_lores_that_start_at_zero_leave_a_plain_moe_bit_for_bit(dtype: torch.dtype, activation: str, choices: int, backend: str) -> None:
    """The compiled kernels put rows into the order of their LoREs: sums over rows, the weights' gradients, are then added in another order."""
    backends = {"grouped_lore": backend, "grouped_gemm": backend}
    experts = build(dtype, activation, moe_lore_init="zero", moe_lore_top_k=choices, kernel_backends=backends)
    assert not experts.lores.b.any()
    plain = GroupedExperts(model_section(activation=activation), moe_section(kernel_backends=backends), build_initializer(model_section(), 3)).to(
        dtype
    )
    plain.load_state_dict({name: weight for name, weight in experts.state_dict().items() if name.startswith("mlp.")})
    x_RD, rows_E = inputs(dtype).requires_grad_(), torch.tensor(ROWS)
    y_RD, wanted = experts(x_RD, rows_E)[0], plain(x_RD, rows_E)[0]
    assert torch.equal(y_RD, wanted)
    got = torch.autograd.grad(y_RD.square().sum(), [x_RD, *experts.mlp.parameters()])
    for one, other in zip(got, torch.autograd.grad(wanted.square().sum(), [x_RD, *plain.parameters()]), strict=True):
        if backend == "reference" or one is got[0]:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_second_routing_is_of_the_rows_as_given() -> None:
    experts = build()
    x_RD = inputs()
    _, routing = experts(x_RD, torch.tensor(ROWS))
    router_EMD = experts.lores.router.view(3, 4, 16)
    logits = torch.cat([x_RD[:5] @ router_EMD[0].T, x_RD[5:] @ router_EMD[2].T])
    torch.testing.assert_close(routing.logit_RM, logits)
    torch.testing.assert_close(routing.probability_RM, logits.softmax(-1))
    assert torch.equal(routing.lore_RL[:, 0], logits.argmax(-1))
    keys = routing.lore_RL[:, 0] + torch.tensor([0] * 5 + [8] * 4)
    assert torch.equal(routing.rows_G, torch.bincount(keys, minlength=12))


def test_router_arithmetic_is_float32_in_a_bfloat16_model() -> None:
    experts = build(torch.bfloat16)
    y_RD, routing = experts(inputs(torch.bfloat16), torch.tensor(ROWS))
    assert y_RD.dtype == torch.bfloat16
    assert routing.logit_RM.dtype == routing.weight_RL.dtype == torch.float32


def test_no_rows_at_all() -> None:
    experts = build()
    y_RD, routing = experts(inputs()[:0], torch.tensor([0, 0, 0]))
    assert y_RD.shape == (0, 16)
    assert routing.rows_G.tolist() == [0] * 12


def test_expert_parameters_are_the_part_of_one_expert() -> None:
    experts = build()
    parts = experts.expert_parameters(2)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "mlp.w1": (24, 16),
        "mlp.w2": (24, 16),
        "lores.router": (4, 16),
        "lores.a": (12, 16),
        "lores.b": (12, 24),
    }
    assert torch.equal(parts["mlp.w1"], experts.mlp.w1[48:])


def test_loads_count_every_choice() -> None:
    out = tiny_model(moe=moe_section(moe_top_k=2, moe_lore_top_k=3))(tokens()[:, :-1])
    assert out.report.expert_load_XE.shape == (2, 3)
    assert out.report.lore_load_XG.shape == (2, 12)
    assert out.report.expert_load_XE.sum(1).tolist() == [2 * 8 * 2] * 2
    assert torch.equal(out.report.lore_load_XG.view(2, 3, 4).sum(2), 3 * out.report.expert_load_XE)
