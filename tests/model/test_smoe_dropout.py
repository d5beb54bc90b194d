"""SMoE-Dropout: how many experts a token has, by what weights, and that the router never learns."""

from __future__ import annotations

import pytest
import torch

from megatron.model.moe.routers.smoe_dropout import grown
from tests.contracts.test_routers import EXPERTS, build, chosen, hidden
from tests.model.tiny_model import moe_section, tiny_model, tokens


def published(step: int, steps: int, least: int, most: int) -> int:
    """The authors' formula (Random-MoE-as-Dropout, new_utils.py, `linear_increase`), in words: the nearest number on the line from least to most."""
    return min(range(least, most + 1), key=lambda k: (abs(k - least - (most - least) * step / steps), -k))


@pytest.mark.parametrize(("least", "most", "steps"), [(8, 16, 400), (1, 4, 1100), (2, 2, 10), (1, 6, 7)])
def test_k_grows_on_a_line(least: int, most: int, steps: int) -> None:
    assert [grown(step / steps, start=least, end=most, span=[0.0, 1.0]) for step in range(steps + 1)] == [
        published(step, steps, least, most) for step in range(steps + 1)
    ]


@pytest.mark.parametrize(("done", "expected"), [(0.0, 1), (0.25, 1), (0.5, 3), (0.75, 4), (1.0, 4)])
def test_k_grows_in_the_given_part_of_the_training(done: float, expected: int) -> None:
    assert grown(done, start=1, end=4, span=[0.25, 0.75]) == expected


def test_a_span_of_no_length_is_a_jump() -> None:
    assert [grown(done, start=1, end=4, span=[0.5, 0.5]) for done in (0.49, 0.5)] == [1, 4]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_k_best_weighted_by_a_softmax_over_their_logits(k: int) -> None:
    router = build("smoe_dropout", moe_top_k=3, moe_router_start_k=k)
    routing = router(hidden())
    best = routing.logit_TE.topk(k).indices
    torch.testing.assert_close(routing.logit_TE, hidden() @ router.layer.weight.T)
    assert torch.equal(chosen(routing), torch.zeros(len(best), EXPERTS, dtype=torch.bool).scatter_(1, best, True))
    torch.testing.assert_close(routing.weight_TK[:, :k], routing.logit_TE.gather(1, best).softmax(-1))


def test_another_number_where_the_model_does_not_train() -> None:
    router = build("smoe_dropout", moe_top_k=3, moe_router_start_k=1, moe_router_eval_k=2)
    assert chosen(router.train()(hidden())).sum(1).unique().tolist() == [1]
    assert chosen(router.eval()(hidden())).sum(1).unique().tolist() == [2]


def test_the_model_grows_and_its_weights_say_how_far() -> None:
    moe = moe_section(moe_router_type="smoe_dropout", moe_top_k=3, moe_router_start_k=1, moe_losses={})
    gpt = tiny_model(moe=moe)
    for done, k in ((0.0, 1), (0.5, 2), (1.0, 3)):
        gpt.grow(done)
        assert gpt(tokens()).report.statistics_XI[:, 2].tolist() == [k, k]
    other = tiny_model(moe=moe, seed=9)
    other.load_state_dict(gpt.state_dict())
    assert torch.equal(other.eval()(tokens()).logits_BSV, gpt.eval()(tokens()).logits_BSV)


def test_a_model_without_this_router_does_not_grow() -> None:
    gpt = tiny_model()
    before = gpt(tokens()).logits_BSV
    gpt.grow(1.0)
    assert torch.equal(gpt(tokens()).logits_BSV, before)


def test_the_router_is_saved_and_not_trained() -> None:
    gpt = tiny_model(moe=moe_section(moe_router_type="smoe_dropout"))
    assert not [name for name, _ in gpt.named_parameters() if ".router." in name]
    assert {name.split(".router.")[1] for name in gpt.state_dict() if ".router." in name} == {"layer.weight", "growth.k"}
