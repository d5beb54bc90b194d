"""Comet, only if the configuration asks for it. COMET_START_ONLINE=false writes an offline archive, as usual."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from megatron.config.logging import LoggingConfig
from megatron.monitor.alerts.alert import Alert
from megatron.monitor.curves import Curves
from megatron.monitor.sink import SinkUnavailable, Value

ADVICE = "Log in with `comet login`, or set COMET_START_ONLINE=false"


class CometSink:
    """Needs the package `comet_ml`. Raises SinkUnavailable when the service refuses the run."""

    def __init__(self, logging: LoggingConfig, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # it would hook itself into PyTorch, and warn that it is too late for that
        import comet_ml

        self._curves = Curves("Comet", detail=logging.curves, most=logging.max_curves)
        settings = comet_ml.ExperimentConfig(
            name=logging.comet_experiment_name,
            tags=logging.comet_tags,
            log_code=False,
            parse_args=False,
            display_summary_level=0,
            auto_metric_logging=False,
            auto_param_logging=False,
            auto_output_logging=False,  # type: ignore[arg-type]
        )
        try:
            self._experiment = comet_ml.start(workspace=logging.comet_workspace, project_name=logging.comet_project, experiment_config=settings)
        except (ValueError, comet_ml.exceptions.CometException) as error:
            raise SinkUnavailable(f"use_comet: true, but Comet refused: {error}. {ADVICE}") from error
        if not self._experiment.alive:
            raise SinkUnavailable(f"use_comet: true, but Comet cannot be reached. {ADVICE}")
        self._experiment.log_parameters(dict(config))
        self._experiment.log_others(logging.comet_others or {})

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        self._experiment.log_metrics(self._curves(values), step=iteration)

    def alert(self, alert: Alert) -> None:
        """A text of the experiment."""
        self._experiment.log_text(alert.sentence, step=alert.step, metadata=alert.record())

    def close(self) -> None:
        self._experiment.end()
