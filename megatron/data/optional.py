"""Packages that are not always installed."""

from __future__ import annotations

from typing import Any

from megatron.config import machine
from megatron.data.indexed import DatasetError


def import_optional(module: str, sentence: str) -> Any:
    """The module. Raises DatasetError with `sentence`, which says what needs the package and how to install it. If the package is installed but
    cannot
    be imported, the reason is added."""
    try:
        return machine.import_optional(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name is not None and f"{module}.".startswith(f"{error.name}.")
        raise DatasetError(sentence if missing else f"{sentence}. The package is installed but cannot be imported: {error}") from None
