"""The recorded experts and LoREs of a text against the routers themselves, asked token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.inference import runner as module
from megatron.inference.model import ReadyModel
from megatron.inference.routing_trace import RoutingTrace
from megatron.inference.runner import ModuleRunner
from megatron.model.moe.layer import MoELayer
from megatron.testing.tiny import TINY_DENSE
from tests.inference.conftest import build_ready, lively_config

PROMPT = [72, 101, 108, 108, 111, 32, 87]


def moe_layers(ready: ReadyModel) -> list[MoELayer]:
    return [layer.mlp for layer in ready.gpt.layers if isinstance(layer.mlp, MoELayer)]


@contextmanager
def router_inputs(ready: ReadyModel) -> Iterator[list[list[Tensor]]]:
    """What each MoE layer's router reads, call by call."""
    seen: list[list[Tensor]] = [[] for _ in moe_layers(ready)]
    hooks = [
        moe.router.register_forward_pre_hook(lambda _, arguments, place=place: place.append(arguments[0].clone()))
        for moe, place in zip(moe_layers(ready), seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def lores_by_definition(moe: MoELayer, x_D: Tensor, expert: int) -> list[int]:
    lores: Any = moe.experts.lores
    router_MD = lores.router.view(lores.num_experts, lores.per_expert, -1)[expert]
    return sorted((router_MD @ x_D).topk(lores.selection.top_k).indices.tolist())


def traced(ready: ReadyModel, answers: int = 2) -> tuple[RoutingTrace, list[list[Tensor]]]:
    runner, trace = ModuleRunner(ready), RoutingTrace()
    state = runner.open(20)
    with router_inputs(ready) as seen:
        runner.prefill(state, PROMPT, trace)
        for token in range(answers):
            runner.decode([state], [65 + token], trace)
    return trace, seen


def test_a_token_has_the_experts_and_lores_that_the_routers_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFILL_CHUNK", 3)  # the record goes across the chunks of a prompt
    ready = build_ready(lively_config(moe_top_k=2, moe_lore_top_k=2, moe_num_lores=4))
    trace, seen = traced(ready)
    layers = moe_layers(ready)
    records = trace.tokens()
    assert len(records) == len(PROMPT) + 2
    for place, (moe, inputs) in enumerate(zip(layers, seen, strict=True)):
        x_TD = torch.cat(inputs)
        expected = moe.router(x_TD)
        for token, record in enumerate(records):
            assert record.experts[place] == expected.expert_TK[token].tolist()
            assert record.weights[place] == pytest.approx(expected.weight_TK[token].tolist(), abs=1e-4)
            assert record.lores is not None
            for expert, lores in zip(record.experts[place], record.lores[place], strict=True):
                assert sorted(lores) == lores_by_definition(moe, x_TD[token], expert)
    assert len({str(record.experts) for record in records}) > 1  # otherwise the order of tokens is not tested


def test_empty_choices_are_left_out() -> None:
    ready = build_ready(lively_config(moe_router_type="top_p", moe_router_top_p=0.5, moe_top_k=None))
    trace, seen = traced(ready)
    records = trace.tokens()
    counts = [len(record.experts[0]) for record in records]
    expected = (moe_layers(ready)[0].router(torch.cat(seen[0])).expert_TK < 4).sum(1).tolist()
    assert counts == expected
    assert min(counts) < max(counts)
    for record in records:
        assert record.lores is not None
        assert all(lore >= 0 for layer in record.lores for chosen in layer for lore in chosen)


def test_without_experts_there_is_nothing_to_record() -> None:
    trace, _ = traced(build_ready(lively_config(TINY_DENSE)))
    assert trace.tokens() == []


def test_logits_are_the_same_with_a_record(ready: ReadyModel) -> None:
    runner = ModuleRunner(ready)
    assert torch.equal(runner.prefill(runner.open(20), PROMPT), runner.prefill(runner.open(20), PROMPT, RoutingTrace()))
