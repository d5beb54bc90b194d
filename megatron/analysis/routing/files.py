"""Findings as JSON and back. NaN is null, arrays are lists."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from megatron.analysis.routing import findings
from megatron.analysis.routing.findings import FORMAT, Findings
from megatron.config.disk import explained

DIGITS = 7
"""Significant digits of a number that is no whole one."""


class FindingsError(ValueError):
    """A file of findings cannot be read or written. The message names it."""


def write_findings(found: Findings, path: Path) -> None:
    """Writes `routing.json` completely or not at all. Raises FindingsError."""
    unfinished = path.with_name(f".{path.name}.new")
    try:
        unfinished.write_text(json.dumps(content(found), allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")
        os.replace(unfinished, path)
    except OSError as error:
        raise FindingsError(f"{path} cannot be written: {explained(error, path)}.") from error


def read_findings(path: Path) -> Findings:
    """What `write_findings` wrote. Raises FindingsError."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FindingsError(f"{path} cannot be read: {explained(error, path)}.") from error
    except ValueError as error:
        raise FindingsError(f"{path} is no JSON: {error}. Write it again with tools/analysis/routing.py.") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise FindingsError(f"{path} is no routing.json of this version (format {FORMAT}). Write it again with tools/analysis/routing.py.")
    try:
        return typing.cast(Findings, rebuilt(Findings, held))
    except (KeyError, TypeError, ValueError) as error:
        raise FindingsError(f"{path} does not hold what routing.json holds ({error}). Write it again with tools/analysis/routing.py.") from error


def content(value: Any) -> Any:
    """For JSON."""
    if dataclasses.is_dataclass(value):
        return {part.name: content(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return content(value.tolist())
    if isinstance(value, list | tuple):
        return [content(part) for part in value]
    if isinstance(value, dict):
        return {str(name): content(part) for name, part in value.items()}
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def rebuilt(kind: Any, value: Any) -> Any:
    """The value of JSON as the annotation says."""
    if get_origin(kind) in (types.UnionType, typing.Union):
        return None if value is None else rebuilt(next(part for part in get_args(kind) if part is not types.NoneType), value)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, vars(findings))
        given = {part.name: part for part in dataclasses.fields(kind) if part.name in value or part.default is dataclasses.MISSING}
        return typing.cast(Any, kind)(**{name: rebuilt(hints[name], value[name]) for name in given})
    if kind == findings.Floats:
        return np.array(value, np.float64)  # None becomes NaN
    if kind == findings.Counts:
        return np.array(value, np.int64)
    if get_origin(kind) is list:
        return [rebuilt(get_args(kind)[0], part) for part in value]
    if kind is float:
        return math.nan if value is None else float(value)
    return value
