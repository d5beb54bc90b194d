"""What is measured of a run: losses on fixed windows of held-out text, and what the routers did there.

Shapes: N windows, S sequence
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.analysis.reproduce.runs import Run
from megatron.analysis.routing.analyse import Request, analyse
from megatron.analysis.routing.findings import Model
from megatron.analysis.routing.progress import Progress
from megatron.analysis.routing.tally import Measures
from megatron.analysis.routing.texts import Domain, file_documents
from megatron.data.indexed import IndexedDataset
from megatron.monitor.sink import Sink
from megatron.training.callbacks.base import Callback
from megatron.training.step import StepMetrics, forward, tally_of
from megatron.training.trainer import Trainer

CURVE = "validation/fixed_text_loss"
"""The key of the curve in metrics.jsonl."""
TOGETHER = 16
"""Windows in one forward pass."""


def windows(prefix: Path | str, *, length: int, tokens: int) -> torch.Tensor:
    """text_NS: windows of `length` + 1 tokens, spread evenly over the whole text, with about `tokens` predictions in all.

    They depend on the text alone, so every arm and seed is measured on the same ones. Neighbours share one token, as in training.
    """
    token_T = IndexedDataset(prefix).tokens
    whole = max(1, (len(token_T) - 1) // length)
    chosen = np.unique(np.linspace(0, whole - 1, min(whole, max(1, tokens // length))).round().astype(int))
    return torch.from_numpy(np.stack([token_T[place * length : (place + 1) * length + 1] for place in chosen]).astype(np.int64))


def loss_on(engine: Any, text_NS: torch.Tensor) -> float:
    """The mean loss of all predictions, in nats per token, with the model in evaluation mode."""
    total = 0.0
    engine.eval()
    try:
        with torch.no_grad():
            for part in text_NS.split(TOGETHER):
                tally = tally_of(engine)
                tally.add(forward(engine, {"text": part}, masked_token=None))
                total += tally.totals()[0] * len(part)
    finally:
        engine.train()
    return total / len(text_NS)


class CurveCallback(Callback):
    """The loss on the same windows at evenly spaced steps, the last one included. A resumed run goes on with it."""

    def __init__(self, sinks: Sequence[Sink], text_NS: torch.Tensor, *, steps: int, points: int) -> None:
        self._sinks, self._text_NS = sinks, text_NS
        self._at = curve_steps(steps, points)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.state.iteration in self._at:
            loss = loss_on(trainer.engine, self._text_NS)
            for sink in self._sinks:
                sink.write(trainer.state.iteration, {CURVE: loss})


def curve_steps(steps: int, points: int) -> list[int]:
    """`points` steps, evenly spaced, the last one at the end."""
    return sorted({round(steps * (place + 1) / points) for place in range(points)} - {0})


def routing_of(run: Run, checkpoint: Path) -> dict[str, Any]:
    """What `tools/analysis/routing.py` finds of a checkpoint on the beginning of the test text, as lists over the layers."""
    words = Domain(run.domain, lambda: file_documents(run.measure["words"]))
    request = Request([checkpoint], [words], tokens=run.measure["routing_tokens"], measures=Measures([4], None, None))
    return numbers_of(analyse(request, Progress(_silent())).models[0])


def numbers_of(model: Model) -> dict[str, Any]:
    """Of the last group, which is all text. Shares and replacement are in percent."""
    found: dict[str, Any] = {
        "busiest_over_mean": _list(model.load.percentiles_GLP[-1, :, -1]),
        "delta_uniform": _list(100 * model.load.delta_uniform_GL[-1]),
        "entropy": _list(model.load.entropy_GL[-1]),
        "replacement": _list(100 * model.repeats.exrep_GL[-1]),
        "first_repeats": _list(100 * model.repeats.first_GL[-1]),
        "first_repeats_random": _list(100 * model.repeats.random_first_L),
    }
    if model.lores is not None:
        known_LE = np.where(np.isnan(model.lores.entropy_GLE[-1]), np.nan, model.lores.entropy_GLE[-1])
        found |= {"lore_entropy": _list(np.nanmean(known_LE, 1)), "dead_lores": model.lores.dead_GLE[-1].sum(1).tolist()}
    return found


def _list(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


def _silent() -> Any:
    from rich.console import Console

    return Console(quiet=True)
