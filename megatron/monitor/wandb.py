"""Weights & Biases, only if the configuration asks for it. WANDB_MODE=offline works as usual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.logging import LoggingConfig
from megatron.monitor.alerts.alert import NAMES, Alert
from megatron.monitor.curves import Curves
from megatron.monitor.sink import SinkUnavailable, Value


class WandbSink:
    """Needs the package `wandb`. Raises SinkUnavailable when the service refuses the run."""

    def __init__(self, logging: LoggingConfig, config: dict[str, Any], *, rank: int) -> None:
        import wandb

        self._curves = Curves("Weights & Biases", detail=logging.curves, most=logging.max_curves)
        try:
            self._run = wandb.init(
                project=logging.wandb_project,
                group=logging.wandb_group,
                name=_run_name(logging.wandb_run_name, rank),
                entity=logging.wandb_team,
                config=config,
                settings=wandb.Settings(base_url=logging.wandb_host, silent=True),
            )
        except wandb.errors.Error as error:
            raise SinkUnavailable(f"use_wandb: true, but wandb refused: {error}. Log in with `wandb login`, or set WANDB_MODE=offline") from error

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        self._run.log(self._curves(values), step=iteration)

    def alert(self, alert: Alert) -> None:
        """An alert of Weights & Biases, which it also sends by mail or Slack if the account says so."""
        self._run.alert(title=f"{NAMES[alert.kind]}{alert.place}", text=alert.sentence, level="WARN")

    def close(self) -> None:
        self._run.finish()


def _run_name(name: str | None, rank: int) -> str | None:
    """The configured name, with the rank where several processes have a run each; None lets wandb choose."""
    return name if name is None or rank == 0 else f"{name}-rank{rank}"
