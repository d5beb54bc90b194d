"""GPT-NeoX's console lines, word for word."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron.monitor.log_line import LogRecord, evaluation_lines, memory_line, progress_line, readable_flops, router_line, time_line, train_line

RECORD = LogRecord(
    iteration=1,
    train_iters=2140,
    samples_per_second=1.195,
    seconds_per_step=13.386,
    learning_rate=1.417e-7,
    flops=18.8e12,
    model_flops=14.1e12,
    peak_flops=None,
    losses={"lm_loss": 1.930013},
    loss_scale=4096.0,
    skipped=0,
    nonfinite=0,
)
# What people's scripts look for.
PARSED = re.compile(
    r" samples/sec: (\d+\.\d{3}) \| iteration +(\d+)/ +(\d+) \| elapsed time per iteration \(ms\): (\d+\.\d) \| "
    r"learning rate: (\d\.\d{3}E[+-]\d\d) \| "
    r"approx flops per GPU: (\d+\.\d)([KMGTPEZ]?FLOPS) \| (?:MFU: (\d+\.\d\d)% \| HFU: (\d+\.\d\d)% \| )?lm_loss: (\d\.\d{6}E[+-]\d\d) \| "
    r"((?:\w+: \d\.\d{6}E[+-]\d\d \| )*)(?:loss scale: (\d+\.\d) \| )?number of skipped iterations: +(\d+) \| number of nan iterations: +(\d+) \|"
)


def test_train_line_is_upstreams() -> None:
    assert train_line(RECORD) == (
        " samples/sec: 1.195 | iteration        1/    2140 | elapsed time per iteration (ms): 13386.0 | learning rate: 1.417E-07 | "
        "approx flops per GPU: 18.8TFLOPS | lm_loss: 1.930013E+00 | loss scale: 4096.0 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 |"
    )


def test_every_part_of_the_line() -> None:
    losses = {"lm_loss": 2.0, "z_loss": 0.5}
    line = train_line(dataclasses.replace(RECORD, peak_flops=55e12, losses=losses, loss_scale=None, skipped=12, nonfinite=3))
    assert line == (
        " samples/sec: 1.195 | iteration        1/    2140 | elapsed time per iteration (ms): 13386.0 | learning rate: 1.417E-07 | "
        "approx flops per GPU: 18.8TFLOPS | MFU: 25.64% | HFU: 34.18% | lm_loss: 2.000000E+00 | z_loss: 5.000000E-01 | "
        "number of skipped iterations:  12 | number of nan iterations:   3 |"
    )


def test_the_routers_line_is_beside_upstreams() -> None:
    values = {
        "moe/load_imbalance": 1.234,
        "moe/delta_uniform": 2.06,
        "moe/router_entropy": 1.019,
        "moe/expert_replacement": 40.13,
        "moe/dead_experts": 1,
        "moe/dropped_tokens": 0,
    }
    start = " routers | load imbalance: 1.23 | delta uniform: 2.1% | entropy: 1.02 | expert replacement: 40.1% | dead experts: 1"
    assert router_line(values) == f"{start} | dropped tokens: 0 |"
    assert router_line({**values, "moe/dead_lores": 3}) == f"{start} | dead lores: 3 | dropped tokens: 0 |"
    assert not PARSED.search(router_line(values)), "scripts that look for GPT-NeoX's line do not find this one"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"peak_flops": 55e12},
        {"loss_scale": None, "flops": 3.2e9},
        {"losses": {"lm_loss": 2.0, "load_balance": 1.0, "z_loss": 0.25}, "iteration": 10**9},
    ],
)
def test_scripts_can_read_it(changes: dict[str, object]) -> None:
    assert PARSED.fullmatch(train_line(dataclasses.replace(RECORD, **changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0.0, "0.0"), (999.0, "999.0"), (1e3, "1.0KFLOPS"), (2.5e6, "2.5MFLOPS"), (999.9e9, "999.9GFLOPS"), (1e15, "1.0PFLOPS"), (5e24, "5000.0ZFLOPS")],
)
def test_flops_have_their_unit(flops: float, text: str) -> None:
    assert readable_flops(flops) == text


def test_memory_line() -> None:
    sizes = {"allocated": 1 << 20, "max allocated": 3 << 19, "reserved": 2 << 20, "max reserved": 2 << 20}
    assert memory_line(10, sizes) == "after 10 iterations memory (MB) | allocated: 1.0 | max allocated: 1.5 | reserved: 2.0 | max reserved: 2.0"


def test_time_line() -> None:
    assert time_line({"forward": 0.01234, "batch generator": 1.5}) == "time (ms) | forward: 12.34 | batch generator: 1500.00"


def test_progress_line_is_deepspeeds() -> None:
    line = progress_line(30, {"loss": 2.34567, "z_loss": 0.5}, seconds_per_step=0.25, samples_per_second=64.0)
    assert line == "steps: 30 loss: 2.3457 z_loss: 0.5000 iter time (s): 0.250 samples/sec: 64.000"


def test_evaluation_lines_are_framed_as_upstreams() -> None:
    first, line, last = evaluation_lines("validation results at iteration 10", 1.0, 2.718282).splitlines()
    assert line == " validation results at iteration 10 | lm_loss value: 1.000000E+00 | lm_loss_ppl value: 2.718282E+00 | "
    assert first == last == "-" * (len(line) + 1)
