"""NeoX's console lines. People parse them: their words, order and number formats are kept (GPT-NeoX, megatron/training.py and logging.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LogRecord:
    """Means over the steps since the last line."""

    iteration: int
    train_iters: int
    samples_per_second: float
    milliseconds_per_step: float
    learning_rate: float
    tflops: float
    """Per device, approximate."""
    model_flops_utilization: float | None
    """Share of the device's peak. None: the peak is not known."""
    losses: Mapping[str, float]
    """lm_loss first, then the auxiliary losses."""
    loss_scale: float | None
    """None: no loss scaling."""
    skipped: int
    nonfinite: int


def train_line(record: LogRecord) -> str:
    parts = [
        f" samples/sec: {record.samples_per_second:.3f}",
        f"iteration {record.iteration:8d}/{record.train_iters:8d}",
        f"elapsed time per iteration (ms): {record.milliseconds_per_step:.1f}",
        f"learning rate: {record.learning_rate:.3E}",
        f"approx flops per GPU: {record.tflops:.1f}TFLOPS",
    ]
    if record.model_flops_utilization is not None:
        parts.append(f"MFU: {record.model_flops_utilization:.2%}")
    parts += [f"{name}: {value:.6E}" for name, value in record.losses.items()]
    if record.loss_scale is not None:
        parts.append(f"loss scale: {record.loss_scale:.1f}")
    parts += [f"number of skipped iterations: {record.skipped:3d}", f"number of nan iterations: {record.nonfinite:3d}"]
    return " | ".join(parts) + " |"


def evaluation_lines(title: str, lm_loss: float, perplexity: float) -> str:
    """` validation results at iteration N | lm_loss value: ... |` between two lines of dashes."""
    line = f" {title} | lm_loss value: {lm_loss:.6E} | lm_loss_ppl value: {perplexity:.6E} | "
    return "\n".join(["-" * len(line), line, "-" * len(line)])
