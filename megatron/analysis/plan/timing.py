"""The time of a step: each kernel by its roofline, each message by its link, the schedule of the pipeline, the sums of gradients, the update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.analysis.plan.efficiency import ATTENTION, HALF, HEAD_HALF, MATMUL, MEMORY, Efficiency
from megatron.analysis.plan.machine import Machine
from megatron.analysis.plan.trace import Trace
from megatron.analysis.plan.work import Work

Seconds = dict[str, float]
"""What takes the time -> seconds."""


class Sums(NamedTuple):
    """What processes exchange of weights and gradients. payload: bytes on this process; times: how often in a step."""

    collective: str
    payload: float
    ranks: tuple[int, ...]
    times: int


def kernel_seconds(work: Work, machine: Machine, stack: Efficiency) -> float:
    """The roofline of one kernel: the slower of its products and its bytes, and never faster than the host starts kernels."""
    if work.kind == "memory":
        busy = work.moved * stack.traffic / (machine.memory_gb_per_s * 1e9 * MEMORY)
    else:
        if work.kind == "attention":
            share = ATTENTION * work.width / (work.width + HEAD_HALF)
        else:
            share = MATMUL * work.rows / (work.rows + HALF) * work.width / (work.width + HALF)
        share *= stack.compute * (stack.experts if work.kind == "grouped" else 1.0)
        moved = work.moved / (machine.memory_gb_per_s * 1e9 * MEMORY)
        busy = max(work.flops / (machine.peak(wide=work.wide) * share), moved)
    return max(busy, stack.host_us * 1e-6)


def micro_batch_seconds(trace: Trace, machine: Machine, stack: Efficiency, groups: Mapping[str, Sequence[int]], copies: int = 1) -> Seconds:
    """By kind of kernel, and by group of processes for messages. `groups`: the ranks of each kind of group of this process. `copies`: rows of a token
    that travel between nodes as one (DeepEP).
    """
    found: defaultdict[str, float] = defaultdict(float)
    host = stack.host_us * 1e-6
    for work, count in trace.work.items():
        seconds = kernel_seconds(work, machine, stack)
        found["host" if seconds <= host else NAMES[work.kind]] += seconds * count
    for message, count in trace.messages.items():
        found[f"messages of the {message.group} group"] += machine.seconds(message.collective, message.payload, groups[message.group], copies) * count
    return dict(found)


NAMES: Mapping[str, str] = {"matmul": "dense products", "grouped": "expert products", "attention": "attention", "memory": "memory traffic"}


def sums_seconds(sums: Sequence[Sums], machine: Machine, stack: Efficiency) -> float:
    """Time of the exchanges of weights and gradients that computation does not hide."""
    return sum(machine.seconds(each.collective, each.payload, each.ranks) * each.times for each in sums) * (1 - stack.hidden)


def update_seconds(moved: float, machine: Machine) -> float:
    """The optimizer reads and writes its state once."""
    return moved / (machine.memory_gb_per_s * 1e9 * MEMORY)


def step_seconds(stages: Sequence[float], micro_batches: int) -> tuple[float, float]:
    """(seconds of all micro-batches, seconds of them in which the slowest stage waits). `stages`: of one micro-batch on each stage.

    One forward, one backward: the first micro-batch passes all stages, the others leave the slowest one after the other (Narayanan et al., 2021).
    """
    slowest = max(stages)
    total = sum(stages) + (micro_batches - 1) * slowest
    return total, total - micro_batches * slowest
