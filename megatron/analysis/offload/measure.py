"""Measuring generation with experts in slow memory: each setting in a process of its own, so that its peak memory is its own.

f/c, the fetch-to-compute ratio, is the time to read one token's experts if none were resident over the time to compute a token with all resident.
Without it a speed-up by fewer moves cannot be compared: it depends on how slow the slow memory is.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.analysis.routing.locality import locality
from megatron.config import config_from_dict
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.offload.counters import Counters, total
from megatron.inference.offload.offloaded import Offloaded
from megatron.inference.offload.record import trace_of_calls
from megatron.inference.offload.table import Move
from megatron.inference.offload.units import moe_layers
from megatron.inference.routing_trace import RoutingTrace
from megatron.inference.runner import Runner, build_runner
from megatron.monitor.routing_trace import Trace

FETCHES = 24
"""Records that are read one after the other to find out how long one takes."""


@dataclass(frozen=True)
class Work:
    """What is generated."""

    keys: Mapping[str, Any]
    """The model's configuration, with `load`."""
    texts: Sequence[str]
    """The prompts come from their beginnings."""
    prompt: int = 1
    """Tokens of a prompt."""
    new: int = 128
    """Tokens that are generated after each."""
    threads: int = 2
    offload: Mapping[str, Any] | None = None
    """None: all experts are resident."""


@dataclass(frozen=True)
class Measured:
    """One setting."""

    tokens_per_second: float
    """Median over the prompts; the prompts' own tokens are not counted."""
    peak_bytes: int
    """Of the process (VmHWM)."""
    exrep: float
    not_uniform: float
    slots: int | None
    """None: all experts are resident."""
    experts: int
    fetch_seconds: float | None
    """To read one token's experts, all of them; None without slots."""
    counters: dict[str, Any] = field(default_factory=dict)
    """While tokens were generated, without the prompts; empty where all experts are resident."""

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(work: Work) -> Measured:
    """Does the work in a new process. Raises InferenceError and what loading raises."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_here, work).result()


def measure_here(work: Work) -> Measured:
    """Does the work in this process."""
    torch.set_num_threads(work.threads)
    keys = {**work.keys, **({} if work.offload is None else {"expert_offload": dict(work.offload)})}
    ready = load_ready_model(config_from_dict(keys))
    prompts = [tokens[: work.prompt] for text in work.texts if len(tokens := ready.tokenizer.encode(text)) >= work.prompt]
    if not prompts:
        raise InferenceError(f"No text has {work.prompt} tokens, so there is no prompt. Give longer texts.")
    runner, calls = build_runner(ready), RoutingTrace()
    _generate(runner, prompts[0], min(8, work.new))
    times, counted = list[float](), Counters()
    for prompt in prompts:
        state = runner.open(len(prompt) + work.new)
        token = int(runner.prefill(state, prompt, calls).argmax())
        before, begun = _counters(ready), time.perf_counter()
        for _ in range(work.new - 1):
            token = int(runner.decode([state], [token], calls)[0].argmax())
        times.append((time.perf_counter() - begun) / max(1, work.new - 1))
        counted = counted.plus(_counters(ready).minus(before))
    trace = trace_of_calls(calls, moe_layers(ready.gpt))
    found = locality(trace, windows=())
    offloaded = ready.offloaded
    return Measured(
        1 / statistics.median(times),
        peak_bytes(),
        found.exrep,
        found.not_uniform,
        None if offloaded is None else offloaded.slots,
        trace.num_experts,
        None if offloaded is None else fetch_seconds(offloaded, trace),
        {} if offloaded is None else counted.content(),
    )


def _generate(runner: Runner, prompt: Sequence[int], new: int) -> None:
    state = runner.open(len(prompt) + new)
    token = int(runner.prefill(state, prompt).argmax())
    for _ in range(new - 1):
        token = int(runner.decode([state], [token])[0].argmax())


def _counters(ready: ReadyModel) -> Counters:
    return Counters() if ready.offloaded is None else total(ready.offloaded.counters)


def fetch_seconds(offloaded: Offloaded, trace: Trace) -> float:
    """To read as many units, one after the other, as a token uses in all layers. The slots are overwritten: the model is of no use afterwards."""
    rng, times, lores = random.Random(1), [], offloaded.options.granularity == "lore"
    for _ in range(FETCHES):
        part = offloaded.layers[rng.choice(list(offloaded.layers))]
        unit = rng.randrange(part.num_lores if lores else part.num_experts)
        begun = time.perf_counter()
        part.slots.fill(Move(unit, 0))
        times.append(time.perf_counter() - begun)
    used = trace.lore_TLKM if lores and trace.lore_TLKM is not None else trace.expert_TLK
    return statistics.median(times) * float((used >= 0).sum()) / max(1, trace.tokens)


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) * 1024
