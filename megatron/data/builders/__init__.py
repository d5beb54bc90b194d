"""Index builders: which tokens make a sample, which data set comes next."""

from __future__ import annotations

from types import ModuleType

from megatron.data.builders import reference


def builders() -> ModuleType:
    return reference
