"""The simulator counts what the engine counts; policies, traces and measures of locality do what their definitions say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.analysis.routing.locality import best_sets, cache_hits, distance_from_uniform, expert_replacement, locality, used_TE, window_counts
from megatron.config.expert_offload import POLICY_NAMES
from megatron.inference.offload.counters import Counters, total
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.policies import POLICIES, Static
from megatron.inference.offload.simulate import simulate
from megatron.inference.runner import build_runner
from megatron.monitor.foreign_traces import read_any_trace
from megatron.monitor.routing_trace import Trace, TraceError, read_trace
from tests.inference.offload.conftest import KINDS, PROMPT, load, logits_of, record_of, write_model

NOT_SIMULATED = ("bytes", "stall_seconds", "host_hits")


def counted(counters: Counters) -> dict[str, Any]:
    return {name: value for name, value in counters.content().items() if name not in NOT_SIMULATED}


def test_every_policy_has_a_class() -> None:
    assert tuple(POLICIES) == POLICY_NAMES


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize(("granularity", "slots"), [("expert", 2), ("expert", 4), ("lore", 4), ("lore", 9)])
def test_the_simulator_counts_as_the_engine(policy: str, granularity: str, slots: int, structmoe: dict[str, Any], tmp_path: Path) -> None:
    trace = record_of(structmoe, tmp_path / "trace.npz", new=12)
    ready = load(structmoe, slots=slots, policy=policy, granularity=granularity, trace=str(tmp_path / "trace.npz"))
    logits_of(ready, new=12)
    assert ready.offloaded is not None
    expected = {layer: counted(counters) for layer, counters in ready.offloaded.counters.items()}
    simulated = simulate(trace, policy=policy, slots=slots, granularity=granularity)
    assert {layer: counted(counters) for layer, counters in simulated.items()} == expected
    assert total(simulated).hits > 0


def test_a_call_that_fails_is_not_in_the_trace(gated: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ready = load(gated, slots=3, record="not_written.npz")
    assert ready.offloaded is not None
    assert ready.offloaded.recorder is not None
    runner = build_runner(ready)
    state = runner.open(9)
    runner.prefill(state, [1, 2, 3])

    def fail(group: list[int]) -> list[int]:
        raise OffloadError("the last layer cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr(ready.offloaded.layers[2].slots, "fetch", fail)
        with pytest.raises(OffloadError, match="the last layer"):
            runner.prefill(state, [4])
    runner.prefill(runner.open(9), [5])
    assert ready.offloaded.recorder.trace().step_T.tolist() == [0, 0, 0, 1]


def test_the_simulator_counts_what_is_computed_in_place(gated: dict[str, Any], tmp_path: Path) -> None:
    trace = record_of(gated, tmp_path / "trace.npz", new=12)
    ready = load(gated, slots=3, policy="static", misses="in_place", trace=str(tmp_path / "trace.npz"))
    logits_of(ready, new=12)
    assert ready.offloaded is not None
    simulated = simulate(trace, policy="static", slots=3, in_place=True)
    assert {n: counted(c) for n, c in simulated.items()} == {n: counted(c) for n, c in ready.offloaded.counters.items()}


def test_experts_that_a_router_leaves_out(tmp_path: Path) -> None:
    keys = write_model(tmp_path / "run", KINDS["top p"])
    trace = record_of(keys, tmp_path / "trace.npz", new=12)
    assert (trace.expert_TLK == -1).any()
    ready = load(keys, slots=8, policy="lru")
    logits_of(ready, new=12)
    assert ready.offloaded is not None
    assert {n: counted(c) for n, c in simulate(trace, policy="lru", slots=8).items()} == {n: counted(c) for n, c in ready.offloaded.counters.items()}


def trace_of(tokens: list[list[int]], num_experts: int = 8) -> Trace:
    return Trace(np.arange(len(tokens)), [0], np.array(tokens)[:, None], num_experts)


def test_policies_by_hand() -> None:
    trace = trace_of([[0], [1], [0], [2], [0], [1], [3], [0]], num_experts=4)
    hits = {policy: total(simulate(trace, policy=policy, slots=2)).hits for policy in POLICY_NAMES}
    # lru: 0 1 (0) 2 (0) 1 3 0; lfu keeps 0; static keeps 0 and 1 from the start; belady drops what is needed last
    assert hits == {"on_demand": 0, "lru": 2, "lfu": 3, "static": 6 - 1, "belady": 3}


def test_on_demand_is_equation_8() -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.choice(8, 2, replace=False).tolist() for _ in range(300)]
    counters = total(simulate(trace_of(tokens), policy="on_demand", slots=2))
    kept = sum(len(set(now) & set(before)) for before, now in itertools.pairwise(tokens))
    assert counters.hits == kept
    assert counters.loads == 600 - kept


def test_belady_bounds_every_other_policy() -> None:
    rng = np.random.default_rng(1)
    for slots in (2, 3, 5):
        trace = trace_of([rng.choice(8, 2, replace=False).tolist() for _ in range(400)])
        hits = {policy: total(simulate(trace, policy=policy, slots=slots)).hits for policy in POLICY_NAMES}
        assert hits["belady"] == max(hits[name] for name in ("on_demand", "lru", "lfu", "belady"))


def test_lru_without_pins_would_miss_more() -> None:
    """Independent choices of 2 of 8 with 2 slots: three quarters are loaded, as long as a token's experts do not evict each other."""
    rng = np.random.default_rng(2)
    trace = trace_of([rng.choice(8, 2, replace=False).tolist() for _ in range(4000)])
    assert total(simulate(trace, policy="lru", slots=2)).replacement_ratio == pytest.approx(0.75, abs=0.02)


def test_belady_of_another_text(gated: dict[str, Any], tmp_path: Path) -> None:
    record_of(gated, tmp_path / "trace.npz", new=12)
    ready = load(gated, slots=2, policy="belady", trace=str(tmp_path / "trace.npz"))
    with pytest.raises(OffloadError, match="belady needs the trace of exactly this text, but its step 0 is another one"):
        logits_of(ready, PROMPT[:3])


def test_static_keeps_the_hottest() -> None:
    assert Static({5: 9, 2: 3, 1: 3}).hottest(8, 4) == [0, 1, 2, 5]


def test_a_megatron_core_trace(tmp_path: Path) -> None:
    record = {"stage": "pre_dispatch", "block": "decoder", "rank": 0, "topk": 2}
    lines = [
        {**record, "step": 0, "layer": 1, "num_tokens": 2, "top_indices": [[0, 1], [2, 3]]},
        {**record, "step": 0, "layer": 3, "num_tokens": 2, "top_indices": [[4, 5], [6, 7]]},
        {**record, "step": 0, "block": "mtp", "mtp_idx": 0, "layer": 0, "num_tokens": 1, "top_indices": [[0, 1]]},
        {**record, "step": 1, "layer": 1, "num_tokens": 1, "top_indices": [[0, 3]]},
        {**record, "step": 1, "layer": 3, "num_tokens": 1, "top_indices": [[7, 4]]},
    ]
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = read_any_trace(path)
    assert (trace.layers, trace.num_experts, trace.step_T.tolist()) == ([1, 3], 8, [0, 0, 1])
    assert trace.steps(1) == [[0, 1, 2, 3], [0, 3]]
    assert trace.steps(3) == [[4, 5, 6, 7], [4, 7]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    with pytest.raises(TraceError, match="its layers do not hold the same tokens in every step"):
        read_any_trace(path)


def test_vllms_array_and_answer(tmp_path: Path) -> None:
    routed = np.arange(24, dtype=np.int16).reshape(4, 3, 2) % 8
    np.save(tmp_path / "routed.npy", routed)
    trace = read_any_trace(tmp_path / "routed.npy", num_experts=16)
    assert trace.expert_TLK.tolist() == routed.tolist()
    assert (trace.step_T.tolist(), trace.num_experts, list(trace.layers)) == ([0, 1, 2, 3], 16, [0, 1, 2])
    answer = {"prompt_routed_experts": routed[:3].tolist(), "choices": [{"routed_experts": routed[3:].tolist()}]}
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    trace = read_any_trace(tmp_path / "answer.json")
    assert trace.step_T.tolist() == [0, 0, 0, 1]
    assert trace.expert_TLK.tolist() == routed.tolist()


@pytest.mark.parametrize("content", ["{}", "[1, 2]", "nonsense", '{"choices": []}'])
def test_what_is_no_trace(content: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(TraceError, match=r"file\.json is no routing trace of this program, vLLM \(\.npy, \.json\) or Megatron-Core"):
        read_any_trace(tmp_path / "file.json")


def test_locality_by_hand() -> None:
    trace = trace_of([[0, 1], [0, 2], [0, 1], [3, 1]], num_experts=4)
    used = used_TE(trace, 0)
    assert expert_replacement(used) == pytest.approx((1 + 1 + 1) / 6)
    assert distance_from_uniform(used) == pytest.approx(1 / 8 + 1 / 8 + 1 / 8 + 1 / 8)
    counts = window_counts(used, 2)
    assert counts.tolist() == [[2, 1, 1, 0], [2, 1, 1, 0], [1, 2, 0, 1]]
    assert cache_hits(counts, 1) == pytest.approx(6 / 12)
    assert cache_hits(counts, 2) == pytest.approx(9 / 12)
    # three pairs used twice: 6 hits of 6 predictions; with the six used once: 12 hits of 18
    f1, ratio = best_sets(counts, 2)
    assert f1 == pytest.approx(max(2 * 6 / (6 + 12), 2 * 12 / (18 + 12)))
    assert ratio == pytest.approx(9 * 2 / 12)


def test_extremes_of_locality() -> None:
    same = locality(trace_of([[1, 2]] * 40), windows=(4, 16, 64))
    assert (same.exrep, same.srp[4], same.sch[16][2], same.size_ratio[16]) == (0.0, 1.0, 1.0, 1.0)
    assert 64 not in same.sch
    turns = locality(trace_of([[2 * (t % 4), 2 * (t % 4) + 1] for t in range(64)]), windows=(4,))
    assert turns.exrep == 1.0
    assert turns.not_uniform == pytest.approx(0.0)
    assert turns.sch[4] == {2: 0.25, 4: 0.5, 8: 1.0}


def test_the_command_line(gated: dict[str, Any], tool: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = record_of(gated, tmp_path / "trace.npz", new=12)
    main = tool("tools/analysis/offload.py").main
    assert main([str(tmp_path / "trace.npz"), "--json", str(tmp_path / "out.json"), "--windows", "4", "--slots", "1", "2", "8"]) == 0
    shown = capsys.readouterr().out
    assert "belady" in shown
    assert "SCH, 2 slots" in shown
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["locality"]["exrep"] == locality(trace).exrep
    lru = next(entry for entry in numbers["simulation"] if (entry["policy"], entry["slots"]) == ("lru", 2))
    assert lru["hits"] == total(simulate(trace, policy="lru", slots=2)).hits
    assert not any(entry["slots"] == 1 for entry in numbers["simulation"])  # one token needs two experts
    assert main([str(tmp_path / "missing")]) == 1
    assert "missing cannot be read: No such file or directory" in capsys.readouterr().err


def whole_trace(**changes: Any) -> dict[str, Any]:
    content = {
        "format": np.int64(1),
        "step_T": np.arange(2),
        "layer_L": np.array([0]),
        "expert_TLK": np.array([[[1]], [[3]]]),
        "num_experts": np.int64(4),
    }
    return {**content, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_TLK": np.array([[[1]], [[7]]])}, r"names expert 7, and a layer has experts from 0 to 3 \(num_experts\)\.$"),
        ({"expert_TLK": np.array([[[1]], [[-5]]])}, "names expert -5, and a layer has experts from 0 to 3"),
        ({"expert_TLK": np.zeros((0, 1, 1), np.int64), "step_T": np.zeros(0, np.int64)}, "holds no token, so there is nothing to replay"),
        ({"num_experts": np.int64(10**9)}, "names 1,000,000,000 experts of a layer: at most 65,536 are possible"),
        ({"format": np.array(["x", "y"])}, r"is no routing trace: it does not hold the arrays of a trace\. Record it again"),
    ],
)
def test_a_trace_with_impossible_numbers(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "trace.npz", **whole_trace())
    assert read_any_trace(tmp_path / "trace.npz").tokens == 2
    np.savez(tmp_path / "trace.npz", **whole_trace(**changes))
    for read in (read_trace, read_any_trace):
        with pytest.raises(TraceError, match=message):
            read(tmp_path / "trace.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 garbage", b"SMOEPACK garbage", b"\x93NUMPY\x01\x00 garbage"])
def test_a_damaged_trace_is_named_without_advice_to_load_it_unsafely(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "trace.npz").write_bytes(content)
    with pytest.raises(
        TraceError, match=r"trace\.npz is no routing trace: .*\. Record it again with expert_offload\.record or routing_trace_steps\.$"
    ) as raised:
        read_trace(tmp_path / "trace.npz")
    assert "pickle" not in str(raised.value)
    with pytest.raises(TraceError, match=r"trace\.npz is no routing trace"):
        read_any_trace(tmp_path / "trace.npz")


def test_numbers_of_another_program_that_cannot_be_experts(tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text('{"choices": [{"routed_experts": [[[999999999]]]}]}')
    with pytest.raises(TraceError, match="names 1,000,000,000 experts of a layer"):
        read_any_trace(tmp_path / "answer.json")
    (tmp_path / "none.jsonl").write_text('{"layer": 0, "step": 0, "top_indices": [[-5]]}\n')
    with pytest.raises(TraceError, match=r"none\.jsonl names no expert"):
        read_any_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(TraceError, match=r"empty\.jsonl holds no record of a decoder layer\.$"):
        read_any_trace(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("length", [0, -4])
def test_a_window_without_a_token_is_refused(length: int) -> None:
    trace = Trace(np.arange(3), [0], np.array([[[0]], [[1]], [[0]]]), 2)
    with pytest.raises(TraceError, match=f"--windows: {length} was given, and a window has at least 1 token"):
        locality(trace, windows=(2, length))
