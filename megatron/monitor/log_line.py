"""The console lines. GPT-NeoX's are parsed by people: their words, order, spacing and number formats are kept; `router_line` is ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.monitor.sink import Value

UNITS = ("", "KFLOPS", "MFLOPS", "GFLOPS", "TFLOPS", "PFLOPS", "EFLOPS", "ZFLOPS")
MEGABYTE = 1024.0**2


@dataclass(frozen=True, kw_only=True)
class LogRecord:
    """Means over the steps since the last line, and the number of skipped steps."""

    iteration: int
    train_iters: int
    samples_per_second: float
    seconds_per_step: float
    learning_rate: float
    flops: float
    """FLOP/s of each device that the hardware did, with recomputation."""
    model_flops: float
    """FLOP/s of each device that the model needs, without recomputation."""
    peak_flops: float | None
    """The peak FLOP/s of the device. None: it is not known, and no utilisation is shown."""
    losses: Mapping[str, float]
    """lm_loss first, then the auxiliary losses."""
    loss_scale: float | None
    """None: no loss scaling."""
    skipped: int
    nonfinite: int


def train_line(record: LogRecord) -> str:
    """` samples/sec: ... | iteration ... | ... |`"""
    parts = [
        f" samples/sec: {record.samples_per_second:.3f}",
        f"iteration {record.iteration:8d}/{record.train_iters:8d}",
        f"elapsed time per iteration (ms): {1000 * record.seconds_per_step:.1f}",
        f"learning rate: {record.learning_rate:.3E}",
        f"approx flops per GPU: {readable_flops(record.flops)}",
    ]
    if record.peak_flops is not None:
        parts += [f"MFU: {record.model_flops / record.peak_flops:.2%}", f"HFU: {record.flops / record.peak_flops:.2%}"]
    parts += [f"{name}: {value:.6E}" for name, value in record.losses.items()]
    if record.loss_scale is not None:
        parts.append(f"loss scale: {record.loss_scale:.1f}")
    parts += [f"number of skipped iterations: {record.skipped:3d}", f"number of nan iterations: {record.nonfinite:3d}"]
    return " | ".join(parts) + " |"


def router_line(values: Mapping[str, Value]) -> str:
    """` routers | load imbalance: ... | delta uniform: ... | ... |` from the `router_values` of all MoE layers together. GPT-NeoX has no such
    line."""

    def shown(name: str, number_format: str) -> str:
        return format(values[f"moe/{name}"], number_format)

    parts = [
        f"load imbalance: {shown('load_imbalance', '.2f')}",
        f"delta uniform: {shown('delta_uniform', '.1f')}%",
        f"entropy: {shown('router_entropy', '.2f')}",
        f"expert replacement: {shown('expert_replacement', '.1f')}%",
        f"dead experts: {shown('dead_experts', 'd')}",
        *([f"dead lores: {shown('dead_lores', 'd')}"] if "moe/dead_lores" in values else []),
        f"dropped tokens: {shown('dropped_tokens', 'd')}",
        *([f"process overload: {shown('process_overload', '.2f')}"] if "moe/process_overload" in values else []),
        *([f"which costs {shown('process_overload_share', '.1%')} of the time"] if "moe/process_overload_share" in values else []),
    ]
    return " | ".join([" routers", *parts]) + " |"


def readable_flops(flops: float) -> str:
    """`18.8TFLOPS`: the largest unit with a number of at least 1 before it."""
    number, unit = flops, 0
    while abs(number) >= 1000 and unit < len(UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:3.1f}{UNITS[unit]}"


def memory_line(iteration: int, sizes: Mapping[str, int]) -> str:
    """`after N iterations memory (MB) | allocated: ... | ...` of sizes in bytes; upstream prints it once, after the first log line."""
    return f"after {iteration} iterations memory (MB) | " + " | ".join(f"{name}: {size / MEGABYTE}" for name, size in sizes.items())


def time_line(seconds: Mapping[str, float]) -> str:
    """`time (ms) | forward: ... | backward: ... | ...` of one step."""
    return "time (ms)" + "".join(f" | {name}: {1000 * value:.2f}" for name, value in seconds.items())


def progress_line(step: int, losses: Mapping[str, float], *, seconds_per_step: float, samples_per_second: float) -> str:
    """DeepSpeed's line every `steps_per_print` steps: `steps: N loss: ... iter time (s): ... samples/sec: ...`, the total loss first."""
    shown = " ".join(f"{name}: {value:0.4f}" for name, value in losses.items())
    return f"steps: {step} {shown} iter time (s): {seconds_per_step:0.3f} samples/sec: {samples_per_second:0.3f}"


def evaluation_lines(title: str, lm_loss: float, perplexity: float) -> str:
    """` validation results at iteration N | lm_loss value: ... |` between two lines of dashes, which are one longer than it, as upstream's."""
    line = f" {title} | lm_loss value: {lm_loss:.6E} | lm_loss_ppl value: {perplexity:.6E} | "
    dashes = "-" * (len(line) + 1)
    return "\n".join([dashes, line, dashes])
