"""A plan as tables and sentences for a terminal, and as values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from megatron.analysis.plan.calibration import Row, error
from megatron.analysis.plan.estimate import Cluster, Estimate, collectives
from megatron.analysis.plan.layouts import Choice, Found
from megatron.analysis.tables import bytes_text, plain_table
from megatron.config.neox import NeoXConfig
from megatron.config.size import flops_per_token

MEMORY = ("weights", "gradients", "optimizer", "activations", "working", "buffers", "reserved")
WITHIN = 0.25
"""The error that a prediction may have."""


def stage_table(found: Estimate, cluster: Cluster) -> Table:
    """A line for the process of each pipeline stage: its parameters and its bytes."""
    columns = ("rank", "parameters", *MEMORY, "in all", "FLOPs per micro-batch", "kernels")
    table = plain_table("stage", *columns, numbers=True, whole=columns)
    for number, stage in enumerate(found.stages):
        sizes = [bytes_text(getattr(stage.memory, name)) for name in MEMORY]
        total = bytes_text(stage.memory.total)
        row = (str(stage.rank), f"{stage.parameters:,}", *sizes, total, f"{stage.trace.flops:.3e}", f"{stage.trace.kernels:,.0f}")
        table.add_row(str(number), *row)
    return table


def message_table(found: Estimate) -> Table:
    """What the process of each stage sends in a step."""
    table = plain_table("stage", "collective", "times", "bytes each time", "bytes in a step", whole=("collective",))
    for number, stage in enumerate(found.stages):
        for name, (times, payload) in collectives(stage, found.batch).items():
            table.add_row(str(number), name, f"{times:,}", bytes_text(payload / times), bytes_text(payload))
    return table


def time_table(found: Estimate) -> Table:
    """What takes the time of a step."""
    table = plain_table("part", "ms", "share", numbers=True)
    for name, seconds in sorted(found.parts.items(), key=lambda part: -part[1]):
        table.add_row(NAMES.get(name, name), f"{1000 * seconds:,.1f}", f"{100 * seconds / found.seconds:.1f} %")
    return table


NAMES = {"host": "small kernels, as fast as the host starts them"}


def summary(config: NeoXConfig, found: Estimate, cluster: Cluster) -> list[str]:
    """Sentences on the layout: time, memory, the whole run."""
    total, room = found.memory.total, cluster.machine.memory_gib * 2**30
    batch, length = found.batch, config.model.seq_length
    lines = [
        f"A step of {batch.global_ * length:,} tokens takes {found.seconds:.3f} s: {found.tokens_per_gpu:,.0f} tokens/s on each GPU, "
        f"{100 * found.mfu:.1f} % MFU. {limit_sentence(found)}",
        f"The fullest process needs {bytes_text(total)} of {bytes_text(room)}."
        + ("" if total <= room else " It does not fit: take a layout from the table below, a smaller micro-batch, or recompute activations."),
    ]
    if config.training.train_iters is not None:
        hours = config.training.train_iters * found.seconds / 3600
        tokens = config.training.train_iters * batch.global_ * length
        lines.append(f"{config.training.train_iters:,} steps ({tokens:,} tokens) take {hours:,.1f} hours, {hours * cluster.gpus:,.0f} GPU hours.")
    return lines


def limit_sentence(found: Estimate) -> str:
    """What limits the speed."""
    share = 100 * found.parts[found.limit] / found.seconds
    return f"The largest part is {NAMES.get(found.limit, found.limit)} ({share:.0f} %)."


def layout_table(found: Sequence[Found], most: int) -> Table:
    """The fastest layouts."""
    columns = ("TP", "PP", "EP", "ZeRO", "micro-batch", "recomputed", "tokens/s/GPU", "MFU", "memory", "largest part")
    table = plain_table(*columns, numbers=True, whole=columns)
    for each in found[:most]:
        layout, estimate = each.choice.layout, each.estimate
        numbers = (str(number) for number in (*layout, each.choice.zero, each.choice.micro))
        speed = f"{estimate.tokens_per_gpu:,.0f}", f"{100 * estimate.mfu:.1f} %"
        table.add_row(*numbers, each.choice.recompute, *speed, bytes_text(estimate.memory.total), estimate.limit)
    return table


def best_sentence(found: Sequence[Found], own: Estimate | None) -> str:
    """Which layout is best, and what limits it."""
    if not found:
        return "No layout fits the memory: use more GPUs, a GPU with more memory, or a smaller model."
    best = found[0]
    beside = "" if own is None else f", {best.estimate.tokens_per_gpu / own.tokens_per_gpu:.2f} times the layout of the configuration"
    return (
        f"Best of {len(found)} layouts that fit: {choice_text(best.choice)}, with {best.estimate.tokens_per_gpu:,.0f} tokens/s on each GPU{beside}. "
        + limit_sentence(best.estimate)
    )


def choice_text(choice: Choice) -> str:
    """`TP 1, PP 1, EP 2, ZeRO 1, 8 sequences a micro-batch, layers recomputed`."""
    kinds = zip(("TP", "PP", "EP"), choice.layout, strict=True)
    recomputed = "nothing recomputed" if choice.recompute == "none" else f"{choice.recompute} recomputed"
    sequences = f"{choice.micro} sequence{'s' if choice.micro > 1 else ''} a micro-batch"
    return ", ".join([*(f"{kind} {size}" for kind, size in kinds), f"ZeRO {choice.zero}", sequences, recomputed])


def calibration_table(rows: Sequence[tuple[Row, Estimate]]) -> Table:
    """Measured and predicted speeds."""
    columns = ("used", "GPUs", "machine", "software", "measured", "predicted", "error")
    table = plain_table("run", *columns, whole=("run", *columns))
    for row, found in rows:
        numbers = f"{row.tokens:,.0f}", f"{found.tokens_per_gpu:,.0f}", f"{100 * error(row, found):+.0f} %"
        table.add_row(row.name, row.used, str(row.gpus), row.machine, row.stack, *numbers)
    return table


def calibration_sentence(rows: Sequence[tuple[Row, Estimate]]) -> str:
    """How many predictions are good enough."""
    parts = []
    for used in ("first", "second", "never"):
        errors = [abs(error(row, found)) for row, found in rows if row.used == used]
        if errors:
            parts.append(f"{used}: {sum(each <= WITHIN for each in errors)} of {len(errors)}")
    good = sum(abs(error(row, found)) <= WITHIN for row, found in rows)
    return f"{good} of {len(rows)} predictions are within {100 * WITHIN:.0f} % of the measured speed ({', '.join(parts)})."


def as_values(config: NeoXConfig, vocabulary: int, found: Estimate, cluster: Cluster) -> dict[str, Any]:
    """The plan of one layout for JSON: bytes, seconds, counts."""
    stages = []
    for stage in found.stages:
        messages = {name: {"times": times, "bytes": payload} for name, (times, payload) in collectives(stage, found.batch).items()}
        memory = {name: getattr(stage.memory, name) for name in (*MEMORY, "total")}
        work = {"flops_per_micro_batch": stage.trace.flops, "kernels_per_micro_batch": stage.trace.kernels}
        stages.append({"rank": stage.rank, "parameters": stage.parameters, "memory": memory, **work, "messages_per_step": messages})
    layout = config.parallel.layout
    return {
        "gpus": cluster.gpus,
        "machine": asdict(cluster.machine),
        "skew": cluster.skew,
        "layout": {**layout._asdict(), "zero": config.optimizer.zero_optimization.stage, "micro_batch": found.batch.micro},
        "flops_per_token": flops_per_token(config.model, config.moe, vocabulary),
        "batch": found.batch._asdict(),
        "step_seconds": found.seconds,
        "seconds_by_part": dict(found.parts),
        "tokens_per_second_per_gpu": found.tokens_per_gpu,
        "mfu": found.mfu,
        "limit": found.limit,
        "stages": stages,
    }


def layout_values(found: Sequence[Found]) -> list[dict[str, Any]]:
    """The layouts of a search for JSON, fastest first."""
    return [
        {
            **each.choice.layout._asdict(),
            "zero": each.choice.zero,
            "micro_batch": each.choice.micro,
            "recompute": each.choice.recompute,
            "tokens_per_second_per_gpu": each.estimate.tokens_per_gpu,
            "mfu": each.estimate.mfu,
            "memory": each.estimate.memory.total,
            "limit": each.estimate.limit,
        }
        for each in found
    ]
