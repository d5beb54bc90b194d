"""The page of keys is what the sections say now, and every key says something."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.neox import SECTION_CLASSES
from megatron.config.reference import reference_page


def test_the_page_is_current(repository: Path) -> None:
    written = (repository / "configs" / "neox_arguments.md").read_text(encoding="utf-8")
    assert written == reference_page(), "run: python -m megatron.config.reference configs/neox_arguments.md"


@pytest.mark.parametrize("name", list(SECTION_CLASSES))
def test_every_key_has_a_meaning(name: str) -> None:
    for key, field in SECTION_CLASSES[name].model_fields.items():
        assert field.description, f"{key} has no docstring"
        optional = field.annotation is not None and type(None) in getattr(field.annotation, "__args__", ())
        assert not optional or "None" in field.description, f"{key} may be None, but its docstring does not say what None means"
