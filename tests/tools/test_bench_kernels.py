"""tools/bench/kernels.py: what it counts, how it compares, and that it runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron.kernels.grouped_lore import grouped_lore
from tests.training.runs import outer_environment


@pytest.fixture(scope="module", autouse=True)
def modules(repository: Path) -> Iterator[None]:
    """The scripts of tools/bench import each other by name."""
    sys.path.insert(0, str(repository / "tools/bench"))
    yield
    sys.path.remove(str(repository / "tools/bench"))


# ---------------------------------------------------------------- what a call must cost


def test_costs_are_those_of_the_hand_computed_table() -> None:
    """d = 1024, F = 4096, r = 64, 32 LoREs in each of 6 experts, bf16: giga-operations and megabytes for 8,192, 16,384 and 32,768 tokens."""
    from moe_bench import rooflines
    from moe_bench.rooflines import Sizes

    for tokens, up, lores, x_mb, h_mb, z_mb in (
        (8192, 137.4 / 2, 1.07 + 4.29, 16.8, 67.1, 1.05),
        (16384, 274.9 / 2, 2.15 + 8.59, 33.6, 134.2, 2.1),
        (32768, 549.8 / 2, 4.29 + 17.2, 67.1, 268.4, 4.2),
    ):
        sizes = Sizes(tokens, 1024, 4096, 6, tokens, 64, 192, 1, 6, 192)
        forward, plain = rooflines.lore_forward(sizes, 2), rooflines.grouped_gemm(sizes, 2)
        assert plain.flops / 1e9 == pytest.approx(up, rel=2e-3)
        assert plain.bytes / 1e6 == pytest.approx(x_mb + h_mb + 50.3, rel=2e-3)
        assert (forward.flops - plain.flops) / 1e9 == pytest.approx(lores, rel=2e-3)
        assert forward.bytes / 1e6 == pytest.approx(x_mb + h_mb + 50.3 + 25.2 + 100.7, rel=2e-3)
        kept = rooflines.lore_forward(sizes, 2, save=True).bytes - forward.bytes
        assert kept / 1e6 == pytest.approx(h_mb + z_mb, rel=2e-3)
        backward = rooflines.lore_backward(sizes, 2)
        assert backward.flops == 2 * forward.flops
        # read: gradient and projections (h each), x, z, parameters; written: gradient of x, gradients of the parameters
        assert backward.bytes / 1e6 == pytest.approx(2 * h_mb + 2 * x_mb + z_mb + 2 * (50.3 + 25.2 + 100.7), rel=2e-3)


def test_matrices_without_rows_are_not_read_but_their_gradients_are_written() -> None:
    from moe_bench import rooflines
    from moe_bench.rooflines import Sizes

    sizes = Sizes(10, 4, 8, used_experts=1, all_experts=3)
    assert rooflines.grouped_gemm(sizes, 4) == (2 * 10 * 4 * 8, 4 * (10 * 12 + 32))
    assert rooflines.grouped_outer(sizes, 4) == (2 * 10 * 4 * 8, 4 * (10 * 12 + 3 * 32))
    gated = sizes._replace(projections=2)
    assert rooflines.lore_forward(gated, 4) == (2 * 2 * 10 * 4 * 8, 4 * (10 * 12 + 2 * 32))


def test_the_experts_of_a_layer() -> None:
    """Gated: three products. 5 tokens with two experts each, width 4, hidden width 8, 2 of 3 experts used, numbers of 2 bytes."""
    from moe_bench import rooflines
    from moe_bench.rooflines import Sizes

    sizes = Sizes(10, 4, 8, used_experts=2, projections=2, all_experts=3)
    product = 2 * 10 * 4 * 8
    assert rooflines.experts(sizes, 2, 5, backward=False) == (3 * product, 2 * (2 * 5 * 4 + 3 * 2 * 32))
    both = rooflines.experts(sizes, 2, 5, backward=True)
    assert both == (9 * product, 2 * (5 * 5 * 4 + 2 * 3 * 2 * 32 + 2 * 3 * 10 * 8 + 3 * 3 * 32))


def test_the_roofline_is_the_slower_of_both_limits() -> None:
    from moe_bench.machine import Rates
    from moe_bench.rooflines import Cost, least_seconds

    assert least_seconds(Cost(1e9, 1e6), Rates(1e11, 1e10)) == 0.01
    assert least_seconds(Cost(1e6, 1e9), Rates(1e11, 1e10)) == 0.1
    assert Cost(1, 2) + Cost(3, 4) == (4, 6)


# ---------------------------------------------------------------- taking turns, ratios, estimates


def test_candidates_take_turns_and_each_round_starts_with_another() -> None:
    from moe_bench.rounds import in_turns

    calls: list[str] = []
    times = in_turns(
        {name: (lambda name=name: calls.append(name), 1) for name in "abc"}, rounds=3, device="cpu", each_round=lambda: calls.append("|")
    )
    assert "".join(calls) == "|abc|bca|cab"
    assert [len(measured.samples) for measured in times.values()] == [3, 3, 3]


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    """A machine that is three times as slow in one round changes nothing."""
    from moe_bench.rounds import Measured, ratio

    assert ratio(Measured((2.0, 6.0, 2.2)), Measured((1.0, 3.0, 1.0))) == 2.0
    assert ratio(Measured((4.0,), estimated=True), Measured((1.0, 2.0, 9.0))) == 2.0
    assert ratio(Measured(()), Measured((1.0,))) is None
    assert ratio(Measured((1.0,)), Measured(())) is None


@pytest.mark.parametrize(
    ("points", "tokens", "wanted"),
    [([(8, 2.0)], 64, 16.0), ([(8, 1.0), (64, 1.56)], 512, 6.04), ([(8, 2.0), (64, 1.0)], 128, 2.0), ([(1, 3.0), (1, 3.0)], 2, 6.0)],
)
def test_an_estimate_is_a_line_through_two_points(points: list[tuple[int, float]], tokens: int, wanted: float) -> None:
    """In proportion where there is one point only, or where more tokens took less."""
    from moe_bench.rounds import estimate

    assert estimate(points, tokens) == pytest.approx(wanted)


def test_a_slow_candidate_is_estimated_and_a_refusal_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_bench import rounds

    asked: list[int] = []

    def build(tokens: int) -> Callable[[], object]:
        return lambda: asked.append(tokens)

    def refuse(tokens: int) -> Callable[[], object]:
        raise RuntimeError("Expected strides | of 16 bytes. Got 3.\nMore.")

    monkeypatch.setattr(rounds, "warm_seconds", lambda call, budget, device: (call(), 0.5 + 0.05 * asked[-1])[1])
    results = rounds.measure({"slow": build, "refuses": refuse}, 640, rounds=2, budget=10.0, device="cpu")
    assert asked == [10, 80], "a 64th and an eighth of the tokens, never all"
    assert results["slow"].median == pytest.approx(0.5 + 0.05 * 640)
    assert results["slow"].note == "estimated: 80 tokens took 4.5 s"
    assert results["refuses"] == rounds.Measured((), "cannot: Expected strides / of 16 bytes")


def test_auto_is_slower_only_where_medians_and_best_times_say_so() -> None:
    from moe_bench.kernel_table import slower_by
    from moe_bench.rounds import Measured

    fast = Measured((1.0, 1.0, 1.0))
    assert slower_by(Measured((1.05, 1.09, 1.0)), fast) is None
    assert slower_by(Measured((1.5, 1.5, 1.0)), fast) is None, "its best round was as fast"
    assert slower_by(Measured((1.5, 1.4, 1.3)), fast) == 1.4
    assert slower_by(Measured((), "cannot"), fast) == math.inf
    assert slower_by(fast, Measured(())) is None


def test_what_the_table_writes() -> None:
    from moe_bench.kernel_table import Row, Slower, kernels_markdown, number, percent, verdict

    assert [number(x) for x in (None, 0.01234, 12.345, 4711.0)] == ["-", "0.0123", "12.3", "4711"]
    assert number(12.0, "estimated: 8 tokens took 1 s") == "~12"
    assert [percent(x) for x in (None, 0.654, 0.00042)] == ["-", "65 %", "0.04 %"]
    row = Row("permute", "compiled", "bf16", "large", 1.5, 2.0, None, 0.5, "auto")
    assert kernels_markdown([row]).splitlines()[2] == "| permute | compiled | bf16 | large | 1.5 | 2 | - | 50 % | auto |"
    assert verdict([]) == "auto always takes the fastest implementation, within 10 %."
    slower = Slower("permute", "bf16", "large", "compiled", "reference", 1.234)
    assert verdict([slower]) == "auto is slower: permute, large, bf16: 'compiled' takes 1.23 times as long as 'reference'"


def test_processor_and_features_are_read() -> None:
    from moe_bench.machine import read_cpuinfo

    xeon = "model name\t: Some Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n\nmodel name\t: Some Xeon\n"
    assert read_cpuinfo(xeon) == ("Some Xeon", ("avx2", "avx512", "avx512_bf16", "amx_bf16"))
    assert read_cpuinfo("model name : Old\nflags : fpu avx\n") == ("Old", ())
    assert read_cpuinfo("")[1] == ()


@pytest.mark.parametrize(("own", "share", "sentences"), [(2.9, "0.05", 1), (1.0, "1.00", 2)])
def test_what_other_programs_used_is_said(own: float, share: str, sentences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two seconds the machine's cores worked for three."""
    from moe_bench import machine

    counters = {"busy_seconds": [100.0, 103.0], "own_seconds": [5.0, 5.0 + own], "perf_counter": [0.0, 2.0]}
    monkeypatch.setattr(machine, "busy_seconds", lambda: counters["busy_seconds"].pop(0))
    monkeypatch.setattr(machine, "own_seconds", lambda: counters["own_seconds"].pop(0))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: counters["perf_counter"].pop(0))
    lines = machine.Watch().sentences(2)
    assert lines[0] == f"Meanwhile other programs used {share} of the 2 cores."
    assert len(lines) == sentences


# ---------------------------------------------------------------- the candidates compute the same


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_built_on_grouped_mm_computes_the_same(number: int) -> None:
    from moe_bench.libraries import grouped_mm_hidden
    from moe_bench.shapes import TINY, Inputs

    inputs = Inputs(TINY[number][0], torch.float32, "cpu")
    routed = inputs.routed(12)
    needs = [routed.x_RD, *inputs.parameters, *([] if routed.choice is None else [routed.choice.pi_RL])]
    ours = grouped_lore(routed.x_RD, inputs.layer(routed), backend="reference")
    theirs = grouped_mm_hidden(inputs, routed, routed.x_RD)
    torch.testing.assert_close(theirs, ours)
    grad = torch.randn(ours.shape)
    for g, w in zip(torch.autograd.grad(theirs, needs, grad), torch.autograd.grad(ours, needs, grad), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_the_experts_of_hugging_face_compute_the_same() -> None:
    from moe_bench.cases import expert_cases
    from moe_bench.shapes import TINY, Inputs

    inputs, case = Inputs(TINY[1][0], torch.float32, "cpu"), next(iter(expert_cases()))
    routed = inputs.routed(12)
    ours: Any = case.ours(inputs, routed, "reference")()
    for build in case.others.values():
        torch.testing.assert_close(build(inputs, routed)(), ours, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the script


def run_main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """In this process, whose memory stays as it is."""
    monkeypatch.setattr(script, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    status: int = script.main()
    return status


def test_every_candidate_has_its_rows(
    tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from megatron.kernels.backends import OPS

    status = run_main(tool("tools/bench/kernels.py"), monkeypatch, "--tiny", "--rounds", "1", "--json", "--output", str(tmp_path / "new"))
    report = json.loads(capsys.readouterr().out)
    assert status == (1 if report["slower"] else 0)
    rows = {(row["op"], row["implementation"], row["dtype"]): row for row in report["rows"]}
    for op, cases in {
        "grouped_gemm": ["grouped_gemm [E, out, in]", "grouped_gemm [E, in, out]", "grouped_gemm outer"],
        "grouped_lore": ["grouped_lore forward", "grouped_lore forward + backward"],
        "permute": ["permute", "combine", "permute + combine, forward + backward"],
        "route": ["route to experts, forward + backward"],
    }.items():
        can_run = [name for name, reason in OPS[op].status("cpu").items() if reason is None]
        libraries = ["built on F.grouped_mm", "dense matmul, as many FLOPs"] if op.startswith("grouped") else []
        for case in cases:
            for name in (*can_run, *libraries):
                row = rows[case, name, "fp32"]
                assert row["ms"] > 0, row
                assert row["roofline"] > 0, row
            assert rows[case, "reference", "fp32"]["over_reference"] == 1.0
            assert rows[case, OPS[op].choose("auto", "cpu"), "fp32"]["note"] == "auto"
    assert rows["experts forward + backward", "Hugging Face grouped_mm", "bf16"]["over_grouped_mm"] == 1.0
    assert {name for op, name, _ in rows if op == "experts forward"} == {"reference", "auto", "Hugging Face grouped_mm", "Hugging Face eager"}
    assert [(cost["implementation"], cost["shape"]) for cost in report["layers"]] == [("auto", "tiny"), ("reference", "tiny")]
    assert (tmp_path / "new/kernels.md").read_text().count("\n| ") > 40
    assert (tmp_path / "new/kernels.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--shape", "huge"], "no shape of these names in these dtypes; known: tiny, tiny gated"),
        pytest.param(
            ["--tiny", "--gpu"], "--gpu: PyTorch finds no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
        ),
    ],
)
def test_what_cannot_be_measured(
    tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run_main(tool("tools/bench/kernels.py"), monkeypatch, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_auto_takes_the_fastest(repository: Path) -> None:
    """At small shapes, in a process of its own, with more rounds than a first look has: other programs disturb it."""
    import subprocess

    command = [sys.executable, str(repository / "tools/bench/kernels.py"), "--quick", "--rounds", "7", "--json"]
    finished = subprocess.run(command, env=outer_environment(), capture_output=True, text=True, timeout=500, check=False)
    assert finished.stdout, finished.stderr
    assert json.loads(finished.stdout)["slower"] == []
    assert finished.returncode == 0, finished.stderr
