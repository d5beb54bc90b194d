"""Offloading of the optimizer and the weights to the CPU's memory: DeepSpeed's settings for it, which of them are taken, and what DeepSpeed is given.

DeepSpeed's own names are in its DeepSpeedZeroOffloadOptimizerConfig and DeepSpeedZeroOffloadParamConfig (0.19.8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.components import did_you_mean

OPTIMIZER, WEIGHTS = "offload_optimizer", "offload_param"
OLD_NAMES = {"cpu_offload": OPTIMIZER, "cpu_offload_param": WEIGHTS}
"""DeepSpeed's earlier name -> the setting that it stands for with {device: cpu}."""
OLD_PIN = "cpu_offload_use_pin_memory"
OFFLOADS = frozenset({OPTIMIZER, WEIGHTS, *OLD_NAMES, OLD_PIN, "zenflow"})

_SWITCH, _COUNT, _SHARE = "must be true or false", "must be a whole number, 0 or more", "must be a number from 0 to 1"
_COMMON = {"device": "", "nvme_path": "", "pin_memory": _SWITCH, "buffer_count": _COUNT}
SETTINGS: Mapping[str, Mapping[str, str]] = {
    OPTIMIZER: {
        **_COMMON,
        "pipeline_read": _SWITCH,
        "pipeline_write": _SWITCH,
        "fast_init": _SWITCH,
        "ratio": _SHARE,
        "super_offload": _SWITCH,
        "cpuadam_cores_perc": _SHARE,
    },
    WEIGHTS: {**_COMMON, "buffer_size": _COUNT, "max_in_cpu": _COUNT},
}
"""Setting -> its entries -> what their values must be."""
_NO_DISK = "offloading to NVMe disks is not part of this version; write device: cpu"
_REFUSED = {
    "ratio": (lambda value: value < 1, "all optimizer state is offloaded or none is; remove it"),
    "super_offload": (lambda value: value is True, "SuperOffload is not part of this version; remove it"),
}


def offload_problem(key: str, value: Any) -> tuple[str, str]:
    """(the entry that is wrong, empty for the whole value; the sentence on it) for a setting of OFFLOADS. The sentence is empty if all is right."""
    if key == "zenflow":
        return "", "" if value in (None, False, {}) else "ZenFlow is not part of this version; remove the setting"
    if key not in SETTINGS:
        return "", "" if value is None or isinstance(value, bool) else _SWITCH
    if value is None:
        return "", ""
    if not isinstance(value, dict):
        return "", "must be a dictionary such as {device: cpu}"
    return next(_entry_problems(key, value), ("", ""))


def _entry_problems(key: str, entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, given in entries.items():
        if name not in SETTINGS[key]:
            yield name, f"DeepSpeed has no such setting{did_you_mean(str(name), SETTINGS[key])}"
        elif name == "device" and given == "nvme":
            yield name, _NO_DISK
        elif name == "device" and given not in ("cpu", "none", None):
            yield name, "must be cpu or none"
        elif name == "nvme_path" and given:
            yield name, f"{_NO_DISK} and remove nvme_path"
        elif not _fits(SETTINGS[key][name], given):
            yield name, SETTINGS[key][name]
        elif name in _REFUSED and given is not None and _REFUSED[name][0](given):
            yield name, _REFUSED[name][1]


def _fits(rule: str, value: Any) -> bool:
    if rule == _SWITCH:
        return isinstance(value, bool)
    if not rule or isinstance(value, bool):
        return not rule
    if rule == _COUNT:
        return isinstance(value, int | float) and value % 1 == 0 and value >= 0
    return isinstance(value, int | float) and 0 <= value <= 1


def offloaded(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is offloaded to the CPU's memory: `offload_optimizer`, `offload_param` -> DeepSpeed's settings of it. `settings`: zero_optimization."""
    found: dict[str, dict[str, Any]] = {}
    for old, new in OLD_NAMES.items():
        if settings.get(old):
            found[new] = {"device": "cpu", "pin_memory": bool(settings.get(OLD_PIN))}
    for key in (OPTIMIZER, WEIGHTS):
        entries = settings.get(key) or {}
        if entries.get("device") == "cpu":
            found[key] = {name: value for name, value in entries.items() if value is not None and name != "nvme_path"}
    return found


def stage_problems(settings: Mapping[str, Any], stage: int) -> Iterator[tuple[str, str]]:
    """(setting as it was written, sentence) for what cannot be offloaded at this ZeRO stage, and for settings that are given under two names."""
    for old, new in OLD_NAMES.items():
        if settings.get(old) and settings.get(new) is not None:
            yield old, f"is another name of '{new}: {{device: cpu}}', which is given too; keep one of them"
    smallest = {OPTIMIZER: (1, "1, 2 or 3"), WEIGHTS: (3, "3")}
    for key in offloaded(settings):
        lowest, allowed = smallest[key]
        if stage < lowest:
            written = next((old for old, new in OLD_NAMES.items() if new == key and settings.get(old)), key)
            what = "weights are" if key == WEIGHTS else "the optimizer is"
            yield written, f"{what} offloaded at zero_optimization.stage {allowed} only, and stage is {stage}"
