"""Warns of faults that the run's own numbers show (`megatron/monitor/alerts/`): on the console, in metrics.jsonl, and in every other sink."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.logging import LoggingConfig
from megatron.config.neox import NeoXConfig
from megatron.config.routers import VARYING
from megatron.model.moe.layer import STATISTICS
from megatron.monitor.alerts.alert import Alert
from megatron.monitor.alerts.losses import MEMORY, LossSpikes, NonfiniteSteps
from megatron.monitor.alerts.routers import Limits, Routers, RouterStep, RouterWatch
from megatron.monitor.jsonl import TRAIN_LOSS, last_numbers
from megatron.monitor.sink import Sink
from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.model.state import RouterReport
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)
YOUNG_STEPS = 20
"""In the first steps of a run, and while the learning rate warms up, the loads of experts are not judged."""
MOST_LINES = 6
"""Alerts of one step that the console shows."""


class AlertsCallback(Callback):
    """Every step is judged. It is a callback of the first process: the numbers are the same on all.

    What a step measured is on the CPU already, so nothing waits for the device. A run that goes on compares its losses with those before, from
    `metrics_file` (None: there is none), and knows nothing of its routers before.
    """

    def __init__(self, trainer: Trainer, sinks: Sequence[Sink], metrics_file: Path | None) -> None:
        config = trainer.config.logging
        self.sinks = sinks
        self._spikes = LossSpikes(rise=config.alert_loss_rise, deviations=config.alert_loss_deviations)
        if metrics_file is not None and trainer.state.iteration:
            self._spikes.remember(last_numbers(metrics_file, TRAIN_LOSS, MEMORY))
        self._nonfinite = NonfiniteSteps(limit=config.alert_nonfinite_steps)
        routers = routers_of(trainer.config, trainer.topology.layout.expert)
        self._routers: RouterWatch | None = None
        if routers.experts:
            settled = max(YOUNG_STEPS, trainer.plan.schedule.warmup_steps)
            self._routers = RouterWatch(routers, limits_of(config), log_interval=config.log_interval, settled=settled)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        step = trainer.state.iteration
        found: list[Alert] = []
        if not metrics.is_empty:
            finite = is_finite(metrics)
            found += self._nonfinite.judge(step, finite=finite, loss=metrics.lm_loss, grad_norm=metrics.grad_norm)
            found += self._spikes.judge(step, metrics.lm_loss)
            if self._routers is not None and finite:
                found += self._routers.judge(step, router_step(metrics.router))
        for alert in found:
            for sink in self.sinks:
                sink.alert(alert)
        for alert in found[:MOST_LINES]:
            log.warning("%s", alert.sentence)
        if len(found) > MOST_LINES:
            log.warning("%d more alerts at step %d are in the metrics file.", len(found) - MOST_LINES, found[0].step)


def is_finite(metrics: StepMetrics) -> bool:
    """Whether loss and gradients are numbers. Gradients that overflow while fp16 looks for its loss scale count as numbers."""
    searching = metrics.loss_scale is not None and math.isfinite(metrics.lm_loss)
    return searching or (math.isfinite(metrics.lm_loss) and math.isfinite(metrics.grad_norm) and metrics.applied)


def limits_of(config: LoggingConfig) -> Limits:
    return Limits(
        dead_share=config.alert_dead_share,
        dead_lores=config.alert_dead_lores,
        entropy=config.alert_entropy,
        entropy_drop=config.alert_entropy_drop,
        overload=config.alert_overload,
    )


def routers_of(config: NeoXConfig, processes: int) -> Routers:
    """The layers with experts. `processes`: expert-parallel ones."""
    sections = config.moe.for_layers(config.model.num_layers).values()
    varies = config.moe.moe_router_type in VARYING
    lores = config.moe.moe_num_lores if config.moe.moe_expert_type == "structmoe" and config.moe.moe_lore_routed else 0
    return Routers(
        experts=tuple(section.num_choices for section in sections),
        top_k=tuple(None if varies else section.top_k for section in sections),
        lores=lores,
        processes=processes,
        zero_computation=config.moe.num_zero_computation,
    )


def router_step(report: RouterReport) -> RouterStep:
    """The counts of one step as NumPy arrays."""
    entropy, overload = (report.statistics_XI[:, STATISTICS.index(name)].double().numpy() for name in ("router_entropy", "process_overload"))
    return RouterStep(report.expert_load_XE.numpy(), report.lore_load_XG.numpy(), entropy, overload)
