"""NeoX's console lines, word for word (neox.md section 7)."""

from __future__ import annotations

import dataclasses

from megatron.monitor.log_line import LogRecord, evaluation_lines, train_line

RECORD = LogRecord(
    iteration=1,
    train_iters=2140,
    samples_per_second=1.195,
    milliseconds_per_step=13386.0,
    learning_rate=1.417e-7,
    tflops=18.8,
    model_flops_utilization=None,
    losses={"lm_loss": 1.930013},
    loss_scale=4096.0,
    skipped=0,
    nonfinite=0,
)


def test_train_line_is_upstreams() -> None:
    assert train_line(RECORD) == (
        " samples/sec: 1.195 | iteration        1/    2140 | elapsed time per iteration (ms): 13386.0 | learning rate: 1.417E-07 | "
        "approx flops per GPU: 18.8TFLOPS | lm_loss: 1.930013E+00 | loss scale: 4096.0 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 |"
    )


def test_optional_parts() -> None:
    line = train_line(dataclasses.replace(RECORD, model_flops_utilization=0.256, losses={"lm_loss": 2.0, "z_loss": 0.5}, loss_scale=None))
    assert "TFLOPS | MFU: 25.60% | lm_loss: 2.000000E+00 | z_loss: 5.000000E-01 | number of skipped" in line


def test_evaluation_lines_are_framed() -> None:
    first, line, last = evaluation_lines("validation results at iteration 10", 1.0, 2.718282).splitlines()
    assert line == " validation results at iteration 10 | lm_loss value: 1.000000E+00 | lm_loss_ppl value: 2.718282E+00 | "
    assert first == last == "-" * len(line)
