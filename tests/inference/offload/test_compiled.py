"""The compiled decoder with experts in slots: the same bits as with all experts resident, for one text and for several."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron.analysis.offload.measure import Work, measure_here
from megatron.inference.decoder.runner import CompiledRunner
from megatron.inference.decoder.steps import OffloadedExperts
from megatron.inference.offload.counters import total
from megatron.inference.offload.record import trace_of_calls
from megatron.inference.offload.simulate import simulate
from megatron.inference.offload.units import moe_layers
from megatron.inference.routing_trace import RoutingTrace
from megatron.inference.runner import ModuleRunner, Runner, build_runner
from megatron.kernels.compiled import load as load_kernels
from megatron.kernels.registry import KernelUnavailable
from megatron.monitor.routing_trace import read_trace
from tests.inference.offload.conftest import KINDS, load, write_model

pytestmark = pytest.mark.skipif(load_kernels()[0] is None, reason=f"the compiled kernels cannot be used: {load_kernels()[1]}")
BY_THE_MODULE = ("latent", "latent structmoe", "zero computation")
"""The decoder leaves these layers to the model's own modules."""
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
    offloaded = build_runner(load(keys, slots=max(2, KINDS[kind].get("moe_top_k", 2)), policy="lru"))
    assert isinstance(offloaded, CompiledRunner)
    assert any(isinstance(layer.feed_forward, OffloadedExperts) for layer in offloaded._decoder.layers) == (kind not in BY_THE_MODULE)
    assert all_logits(offloaded).equal(all_logits(build_runner(load(keys))))


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("policy", ["on_demand", "lru", "lfu"])
def test_policies(policy: str, prefetch: bool, gated: dict[str, Any]) -> None:
    wanted = all_logits(build_runner(load(gated)))
    assert all_logits(build_runner(load(gated, policy=policy, prefetch=prefetch, slots=3))).equal(wanted)


def test_what_only_the_models_forward_can_do_is_done_by_it(structmoe: dict[str, Any]) -> None:
    """Then the logits are those of the model's forward, bit for bit."""
    forward = all_logits(build_runner(load({**structmoe, "kernel_backends": {"decode": "reference"}})))
    record = {"slots": 2, "policy": "lru", "record": "not_written.npz"}
    for changes in ({"granularity": "lore", "slots": 4}, {"misses": "in_place", "slots": 2, "policy": "static"}, record):
        runner = build_runner(load(structmoe, **changes))
        assert not isinstance(runner, CompiledRunner)
        assert all_logits(runner).equal(forward)


@pytest.mark.parametrize("kind", ["gated", "structmoe"])
def test_the_simulator_counts_as_the_engine_does(kind: str, tmp_path: Path) -> None:
    ready = load(write_model(tmp_path / "run", KINDS[kind]), slots=4, policy="lru")
    runner, calls = build_runner(ready), RoutingTrace()
    state = runner.open(30)
    tokens = [int(runner.prefill(state, [1], calls).argmax())]  # a prompt of one token: longer ones may be computed row by row
    for _ in range(12):
        tokens.append(int(runner.decode([state], tokens[-1:], calls)[0].argmax()))
    assert ready.offloaded is not None
    simulated = total(simulate(trace_of_calls(calls, moe_layers(ready.gpt)), policy="lru", slots=4))
    assert simulated.hits == total(ready.offloaded.counters).hits > 0


def test_one_slot_is_enough_where_a_token_uses_one_expert(tmp_path: Path) -> None:
    """The slab has room for two even then."""
    keys = write_model(tmp_path / "run", {**KINDS["gated"], "moe_top_k": 1})
    assert all_logits(build_runner(load(keys, slots=1, policy="lru"))).equal(all_logits(build_runner(load(keys))))


def test_belady_makes_the_calls_of_its_trace(gated: dict[str, Any], tmp_path: Path) -> None:
    """A trace is recorded from the model's forward. The compiled decoder calls the layers for several texts at once, which are other steps."""
    trace = tmp_path / "trace.npz"
    recorded = load(gated, slots=2, policy="lru", record=str(trace))
    wanted = all_logits(build_runner(recorded))
    assert recorded.offloaded is not None
    recorded.offloaded.finish(Console(file=io.StringIO()))
    assert read_trace(trace).tokens == (3 + 11 + 19) + 3 * 4  # of the prompts, and every new token
    assert all_logits(build_runner(load(gated, slots=2, policy="belady", trace=str(trace)))).equal(wanted)


def test_a_compiled_decoder_that_is_named_cannot_record(gated: dict[str, Any]) -> None:
    with pytest.raises(KernelUnavailable, match=r"decode: compiled\} cannot run: expert_offload\.record needs the model's own forward"):
        build_runner(load({**gated, "kernel_backends": {"decode": "compiled"}}, slots=2, record="not_written.npz"))


@pytest.mark.parametrize("kind", ["plain", "structmoe", "by layer"])
def test_the_trace_of_a_runners_calls_is_the_recorders(kind: str, tmp_path: Path) -> None:
    """A caller that asks for the calls of a recording runner gets them, too."""
    keys = write_model(tmp_path / "run", KINDS[kind])
    whole, recorded = load(keys), load(keys, slots=3, record="not_written.npz")
    runners = build_runner(recorded), ModuleRunner(whole), build_runner(load(keys))
    traces = [RoutingTrace() for _ in runners]
    for runner, calls in zip(runners, traces, strict=True):
        state = runner.open(30)
        runner.prefill(state, range(1, 6), calls)
        for token in (5, 9, 40):
            runner.decode([state], [token], calls)
    assert recorded.offloaded is not None
    assert recorded.offloaded.recorder is not None
    expected = recorded.offloaded.recorder.trace()
    for calls in traces:
        found = trace_of_calls(calls, moe_layers(whole.gpt))
        assert (found.step_T == expected.step_T).all()
        assert list(found.layers) == list(expected.layers)
        for layer in found.layers:
            assert found.steps(layer) == expected.steps(layer)
            if expected.lore_TLKM is not None:
                assert found.steps(layer, granularity="lore") == expected.steps(layer, granularity="lore")
        assert (found.num_experts, found.num_lores) == (expected.num_experts, expected.num_lores)


def test_measuring_a_model_in_another_format_than_its_checkpoint(gated: dict[str, Any]) -> None:
    """The reading threads convert what they read, which they may not do to tensors that were made in inference mode."""
    found = measure_here(Work({**gated, "precision": "bfloat16"}, ["Fellow citizens"], new=4, threads=torch.get_num_threads(), offload={"slots": 2}))
    assert found.slots == 2
    assert found.counters["selections"] > 0


def test_a_layer_that_is_not_served_keeps_its_weights_in_int8_models(tmp_path: Path) -> None:
    """The shared expert beside offloaded experts: whether the kernels serve the layer is known before any weight is rounded and freed."""
    groups = {"moe_router_type": "sigmoid", "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_num_shared_experts": 1}
    keys = write_model(tmp_path / "run", {**KINDS["gated"], **groups})
    ready = load({**keys, "inference_weights": "int8"}, slots=4, policy="lru")
    runner = build_runner(ready)
    assert isinstance(runner, CompiledRunner)
    assert all("SigmoidRouter" in reason for reason in runner._decoder.modules)
    near = all_logits(build_runner(load(keys)))
    torch.testing.assert_close(all_logits(runner), near, rtol=0, atol=0.05 * near.abs().max().item())
