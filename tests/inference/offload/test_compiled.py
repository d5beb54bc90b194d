"""The compiled decoder with experts in slots: the same bits as with all experts resident, for one text and for several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.inference.decoder.runner import CompiledRunner
from megatron.inference.decoder.steps import OffloadedExperts
from megatron.inference.offload.counters import total
from megatron.inference.offload.record import Recorder
from megatron.inference.offload.simulate import simulate
from megatron.inference.offload.units import moe_layers
from megatron.inference.runner import ModuleRunner, Runner, build_runner
from megatron.kernels.compiled import load as load_kernels
from tests.inference.offload.conftest import KINDS, load, write_model

pytestmark = pytest.mark.skipif(load_kernels()[0] is None, reason=f"the compiled kernels cannot be used: {load_kernels()[1]}")
SERVED = [kind for kind in KINDS if kind != "top p"]


@torch.inference_mode()
def all_logits(runner: Runner) -> torch.Tensor:
    """Prompts that go through the kernels and through the model's forward, then tokens of one text and of three together."""
    states = [runner.open(30) for _ in range(3)]
    rows = [runner.prefill(state, range(1, 4 + 8 * text)) for text, state in enumerate(states)]
    for token in (5, 9, 40):
        rows += runner.decode(states[:1], [token])
        rows += runner.decode(states, [token, token + 1, token + 2])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", SERVED)
def test_every_kind_of_expert(kind: str, tmp_path: Path) -> None:
    keys = write_model(tmp_path / "run", KINDS[kind])
    offloaded = build_runner(load(keys, slots=2, policy="lru"))
    assert isinstance(offloaded, CompiledRunner)
    assert any(isinstance(layer.feed_forward, OffloadedExperts) for layer in offloaded._decoder.layers)
    assert all_logits(offloaded).equal(all_logits(build_runner(load(keys))))


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("policy", ["on_demand", "lru", "lfu"])
def test_policies(policy: str, prefetch: bool, gated: dict[str, Any]) -> None:
    wanted = all_logits(build_runner(load(gated)))
    assert all_logits(build_runner(load(gated, policy=policy, prefetch=prefetch, slots=3))).equal(wanted)


def test_what_only_the_models_forward_can_do_is_done_by_it(structmoe: dict[str, Any]) -> None:
    """Then the logits are those of the model's forward, bit for bit."""
    forward = all_logits(build_runner(load({**structmoe, "kernel_backends": {"decode": "reference"}})))
    for changes in ({"granularity": "lore", "slots": 4}, {"misses": "in_place", "slots": 2, "policy": "static"}):
        runner = build_runner(load(structmoe, **changes))
        assert type(runner) is ModuleRunner
        assert all_logits(runner).equal(forward)


@pytest.mark.parametrize("kind", ["gated", "structmoe"])
def test_the_routing_is_recorded_and_the_simulator_counts_as_the_engine_does(kind: str, tmp_path: Path) -> None:
    keys = write_model(tmp_path / "run", KINDS[kind])
    compiled, forward = load(keys, slots=4, policy="lru"), load({**keys, "kernel_backends": {"decode": "reference"}}, slots=4, policy="lru")
    traces = []
    for ready in (compiled, forward):
        runner, recorder = build_runner(ready), Recorder(moe_layers(ready.gpt))
        state = runner.open(30)
        tokens = [int(runner.prefill(state, [1]).argmax())]  # a prompt of one token: longer ones may be computed row by row
        for _ in range(12):
            tokens.append(int(runner.decode([state], tokens[-1:])[0].argmax()))
        traces.append(recorder.trace())
    assert traces[0].step_T.tolist() == traces[1].step_T.tolist()
    assert traces[0].expert_TLK.tolist() == traces[1].expert_TLK.tolist()
    assert compiled.offloaded is not None
    assert total(simulate(traces[0], policy="lru", slots=4)).hits == total(compiled.offloaded.counters).hits > 0
