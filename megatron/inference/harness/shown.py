"""Results of tasks for people and trackers: a table, and numbers for the destinations of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from megatron.config.neox import NeoXConfig
from megatron.monitor.sinks import MetricsFile, metrics_path, open_sinks


def tasks_scalars(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`eval/<task>_<metric>` -> value, standard errors included. The name of a filter follows the metric, except for the harness's `none`."""
    found = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            if isinstance(value, int | float) and "," in key:
                found[f"eval/{task}_{key.removesuffix(',none')}"] = float(value)
    return found


def tasks_table(results: Mapping[str, Any]) -> Table:
    """A row for each task and metric."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("task", "shots", "documents", "metric", "value", "standard error"):
        table.add_column(title, justify="left" if title in ("task", "metric") else "right", overflow="fold")
    for task, metrics in results["results"].items():
        shots, counts = results["n-shot"].get(task, ""), results["n-samples"].get(task, {})
        for key, value in metrics.items():
            name, _, rule = key.partition(",")
            if not rule or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{rule}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else ""
            metric = name if rule == "none" else f"{name} ({rule})"
            table.add_row(str(metrics.get("alias", task)), str(shots), f"{counts.get('effective', '')}", metric, f"{value:.4f}", shown)
    return table


def log_results(config: NeoXConfig, iteration: int, values: Mapping[str, float]) -> None:
    """Gives the numbers to the trackers that the configuration names, and adds a line to the metrics file of the run if it has one.

    Raises SinkUnavailable.
    """
    path = metrics_path(config.logging, config.checkpoint.save)
    metrics = MetricsFile(path, resume_from=None) if path is not None and path.is_file() else None
    for sink in open_sinks(config, metrics, resume_from=0, failures=[]):
        sink.write(iteration, values)
        sink.close()
