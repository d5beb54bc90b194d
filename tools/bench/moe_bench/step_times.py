"""How long the steps take and how much memory they need."""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.training.process import start_process
from moe_bench.machine import Call
from moe_bench.rounds import Measured, in_turns, measure, ratio
from moe_bench.steps import HUGGING_FACE, LORES, HuggingFace, Shape, Side, engine_side, huggingface_side, quickstart_side

ENVIRONMENT = dict(os.environ)
"""Before this process joined a group."""
OURS, STRUCTMOE, WIDER = "ours", "ours, StructMoE", "ours, plain with as many parameters"


class Row(NamedTuple):
    """One side at one precision."""

    side: str
    precision: str
    parameters: int
    ms: float
    tokens_per_second: float
    over_best: float | None
    """Tokens/s over those of the best Hugging Face side."""
    peak_mib: float | None
    """Peak memory of a process that only trains like this. None: not measured."""
    before_mib: float | None
    """Of that, what was there before the model: Python and libraries."""
    note: str


def engine_builders(shape: Shape) -> dict[str, Callable[[str], Side]]:
    """Ours, and the StructMoE model with the plain one that has as many parameters: half as many experts again."""
    wider = shape._replace(experts=shape.experts * 3 // 2)
    return {
        OURS: lambda precision: engine_side(shape, precision),
        STRUCTMOE: lambda precision: engine_side(shape, precision, **LORES),
        WIDER: lambda precision: engine_side(wider, precision),
    }


def side_names(precision: str, *, small: bool) -> list[str]:
    """What is measured; with `small` less in bf16, because most processors have no instructions for it."""
    if small and precision == "bf16":
        return [OURS, "Hugging Face grouped_mm", "Hugging Face grouped_mm, autocast"]
    return [OURS, STRUCTMOE, WIDER, *(name for name, (_, _, precisions) in HUGGING_FACE.items() if precision in precisions)]


def measure_steps(shape: Shape, precision: str, names: list[str], *, rounds: int, budget: float) -> tuple[dict[str, Measured], dict[str, int]]:
    """(times, parameters) by side. A side whose step would take longer than `budget` seconds is estimated from steps with fewer tokens."""
    models: dict[str, HuggingFace] = {}
    engines = engine_builders(shape)
    sides = {name: engines[name](precision) if name in engines else huggingface_side(shape, precision, name, models) for name in names}

    def candidate(side: Side) -> Callable[[int], Call]:
        return lambda tokens: partial(side.step, shape.text(tokens))

    candidates = {name: candidate(side) for name, side in sides.items()}
    times = measure(candidates, shape.tokens, rounds=rounds, budget=budget, device="cpu")
    return times, {name: side.parameters for name, side in sides.items()}


# ---------------------------------------------------------------- memory


def memory_names(times: dict[str, Measured], *, small: bool) -> list[str]:
    """The sides whose memory is measured: all that were not estimated; with `small` ours and the fastest of the others."""
    sides = [name for name, measured in times.items() if not measured.estimated]
    theirs = sorted((name for name in sides if name in HUGGING_FACE), key=lambda name: times[name].median or 0.0)
    return [OURS, *theirs[:1]] if small else sides


def peak_bytes() -> int:
    """Of this process. Linux's own count, because `ru_maxrss` starts with the peak of the process that started this one."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train_for_memory(shape: Shape, precision: str, name: str, steps: int = 3) -> dict[str, int]:
    """Peak memory of this process, which trains one side and nothing else: before the model is made, and in the end.

    Each side loads its own libraries, and only ours changes how memory is kept, as in a run of it.
    """
    build = engine_builders(shape).get(name)
    if build is None:
        importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    else:
        start_process(backend=None, threads=None)
    before = peak_bytes()
    side = build(precision) if build else huggingface_side(shape, precision, name, {})
    for _ in range(steps):
        side.step(shape.text())
    return {"before": before, "peak": peak_bytes()}


def memory_of(arguments: list[str]) -> dict[str, int]:
    """`train_for_memory` in a process of its own, without the rank and the port of this one. Raises RuntimeError with its last words if it fails."""
    finished = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True, env=ENVIRONMENT)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{finished.stderr[-2000:]}")
    result: dict[str, int] = json.loads(finished.stdout.splitlines()[-1])
    return result


# ---------------------------------------------------------------- the quickstart


ONE_THREAD = ", one thread"


class Quickstart(NamedTuple):
    """`kernel_backends` all `reference` against `auto`, and against itself with one thread.

    The last one says what rounding alone does: another order of the same additions now and then turns a near tie of a router.
    """

    reference_steps_per_second: float
    auto_steps_per_second: float
    ratio: float
    steps: int
    largest_loss_difference: float
    last_loss_difference: float
    last_loss: float
    largest_difference_by_rounding: float


def measure_quickstart(repository: Path, steps: int) -> Quickstart:
    """All train on the same text, step by step in turns."""
    kinds = {name: quickstart_side(repository, name.removesuffix(ONE_THREAD)) for name in ("reference", "auto", f"reference{ONE_THREAD}")}
    sides = {name: side for name, (side, _, _) in kinds.items()}
    _, sequences, length = kinds["auto"]
    threads = torch.get_num_threads()
    texts = speech_texts(steps + 1, sequences, length + 1)
    losses: dict[str, list[float]] = {name: [] for name in sides}
    position = [0]

    def step(name: str) -> None:
        torch.set_num_threads(1 if name.endswith(ONE_THREAD) else threads)
        losses[name].append(sides[name].step(texts[position[0]]).lm_loss)
        torch.set_num_threads(threads)

    def advance() -> None:
        position[0] += 1

    for name in sides:
        step(name)
    times = in_turns({name: (partial(step, name), 1) for name in sides}, rounds=steps, device="cpu", each_round=advance)
    differences, by_rounding = (
        [abs(a - b) for a, b in zip(losses["reference"], losses[name], strict=True)] for name in ("auto", f"reference{ONE_THREAD}")
    )
    per_second = [1 / (times[name].median or 1.0) for name in ("reference", "auto")]
    speedup = ratio(times["reference"], times["auto"]) or 0.0
    return Quickstart(*per_second, speedup, steps, max(differences), differences[-1], losses["auto"][-1], max(by_rounding))


def speech_texts(count: int, sequences: int, length: int) -> list[Tensor]:
    """Batches of bytes of the installed speeches: text with something to learn in it."""
    from megatron.data.corpus.corpora import Request, find_corpus

    needed, text = count * sequences * length, bytearray()
    for document in find_corpus(Request(inputs=("sotu",))).documents(lambda problem: None):
        text += document.text.encode()
        if len(text) >= needed:
            break
    tokens = torch.frombuffer((text * (needed // len(text) + 1))[:needed], dtype=torch.uint8).long()
    return list(tokens.view(count, sequences, length))


def rows_of(times: dict[str, Measured], parameters: dict[str, int], memory: dict[str, dict[str, int]], shape: Shape, precision: str) -> list[Row]:
    """The table of one precision."""
    theirs = [times[name] for name in HUGGING_FACE if name in times]
    best = min(theirs, key=lambda each: each.median or float("inf"))
    rows: list[Any] = []
    for name, measured in times.items():
        assert measured.median is not None
        used = {key: value / 2**20 for key, value in memory.get(name, {}).items()}
        speed = 1000 * measured.median, shape.tokens / measured.median, ratio(best, measured)
        rows.append(Row(name, precision, parameters[name], *speed, used.get("peak"), used.get("before"), measured.note))
    return rows
