"""Small token files, and a cache directory that is not the user's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron.data.indexed import IndexedDatasetWriter

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "data_order.json"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache" / "structmoe-neox" / "index_maps"


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2") -> Path:
    with IndexedDatasetWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)
    return prefix


@pytest.fixture
def numbered(tmp_path: Path) -> Callable[..., Path]:
    """Documents of the given sizes whose tokens count up through the file: a token tells where it came from."""

    def make(sizes: Sequence[int], name: str = "text") -> Path:
        ends = np.cumsum(sizes)
        return write(tmp_path / name, [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)])

    return make


@pytest.fixture
def data_config() -> Callable[..., Any]:
    """A DataConfig with these keys; the section's own rules are config's business."""
    from megatron.config.data import DataConfig

    def make(**keys: Any) -> Any:
        fields = {name: field.default for name, field in DataConfig.model_fields.items()}
        return SimpleNamespace(**{**fields, **keys})

    return make
