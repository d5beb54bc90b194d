"""Which of a run's numbers become curves in TensorBoard, Weights & Biases and Comet. These become slow, and hard to read, with thousands of curves.

A key of the sinks holds a number, a number for each MoE layer, or a table (MoE layers x experts). Keys are taken in the order in which they come.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import numpy as np

from megatron.monitor.sink import Value, scalars

log = logging.getLogger(__name__)

Detail = Literal["brief", "detailed"]
SPARE = 5
"""One curve in this many is kept for plain numbers that come later, such as the first validation loss."""
PERCENTILES = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "max": 100}
OF_PARAMETERS = ("gradient_norms/", "parameter_norms/", "pct_grad_zeros/", "optimizer_state_norms/")
"""Plain numbers of which there may be thousands."""


class Curves:
    """Chooses the curves of one destination (`place`, for the message), and never more than `most`.

    `detailed` writes a curve for each layer and each expert of a key if all of them fit, else the brief ones. A warning says once for each key what
    is left out.
    """

    def __init__(self, place: str, *, detail: Detail, most: int) -> None:
        self.place = place
        self.detail = detail
        self.most = most
        self._chosen: dict[str, bool] = {}
        """Key -> whether it is written in detail. A key that is not written at all is in `_left_out`."""
        self._names: set[str] = set()
        self._left_out: set[str] = set()
        self._named: set[str] = set()
        """Groups of keys that a warning has named."""

    def __call__(self, values: Mapping[str, Value]) -> dict[str, float]:
        """The numbers to write, by the names of their curves."""
        numbers: dict[str, float] = {}
        shortened: dict[str, int] = {}
        for key, value in sorted(values.items(), key=lambda item: isinstance(item[1], list) or item[0].startswith(OF_PARAMETERS)):
            forms = [scalars({key: value}), brief(key, value)] if self.detail == "detailed" else [brief(key, value)]
            found = self._first_that_fits(key, value, forms)
            if len(found) < len(forms[0]):
                shortened[key] = len(forms[0]) - len(found)
            numbers |= found
        self._warn(shortened)
        return numbers

    def _first_that_fits(self, key: str, value: Value, forms: list[dict[str, float]]) -> dict[str, float]:
        if key in self._left_out:
            return {}
        if key in self._chosen:
            return forms[0] if self._chosen[key] else forms[-1]
        is_plain = not isinstance(value, list) and not key.startswith(OF_PARAMETERS)
        room = self.most - (0 if is_plain else self.most // SPARE) - len(self._names)
        for form in forms:
            if len(form.keys() - self._names) <= room:
                self._chosen[key] = form is forms[0]
                self._names |= form.keys()
                return form
        self._left_out.add(key)
        return {}

    def _warn(self, shortened: dict[str, int]) -> None:
        groups: dict[str, int] = {}
        for key, count in shortened.items():
            group = next((group.rstrip("/") for group in OF_PARAMETERS if key.startswith(group)), key)
            if group not in self._named:
                groups[group] = groups.get(group, 0) + count
        if not groups:
            return
        self._named |= groups.keys()
        listed = ", ".join(f"{group} ({count:,})" for group, count in groups.items())
        log.warning("%s has at most %s curves (max_curves). Left out: %s. metrics.jsonl has all numbers.", self.place, f"{self.most:,}", listed)


def brief(key: str, value: Value) -> dict[str, float]:
    """The few curves that stand for a key: a number itself; of a number for each layer the smallest and the largest, or with one layer the number;
    of a table the percentiles over all experts of all layers, as multiples of an even load."""
    if not isinstance(value, list):
        return {key: float(value)}
    name = key.removesuffix("_by_layer")
    if not value:
        return {}
    if not isinstance(value[0], list):
        numbers = [float(number) for number in value]
        return {f"{name}/min": min(numbers), f"{name}/max": max(numbers)}
    rows = [np.asarray(row, dtype=float) for row in value]
    shares = np.concatenate([row * len(row) / max(1.0, row.sum()) for row in rows])
    return {f"{name}/{percentile}": float(np.percentile(shares, rank)) for percentile, rank in PERCENTILES.items()} if shares.size else {}
