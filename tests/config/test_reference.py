"""The page of keys is what the sections say now, and every key says something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.neox import SECTION_CLASSES
from megatron.config.reference import PAGE, reference_page


def test_the_page_is_current(repository: Path) -> None:
    written = (repository / "configs" / "neox_arguments.md").read_text(encoding="utf-8")
    assert written == reference_page(), "run: make docs"


def test_the_command_of_make_docs_writes_the_page(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "configs").mkdir()
    command = [sys.executable, "-m", "megatron.config.reference"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(repository)}, check=True)
    assert (tmp_path / PAGE).read_text(encoding="utf-8") == reference_page()
    assert "@$(python) -m megatron.config.reference\n" in (repository / "Makefile").read_text()


@pytest.mark.parametrize("name", list(SECTION_CLASSES))
def test_every_key_has_a_meaning(name: str) -> None:
    for key, field in SECTION_CLASSES[name].model_fields.items():
        assert field.description, f"{key} has no docstring"
        optional = field.annotation is not None and type(None) in getattr(field.annotation, "__args__", ())
        assert not optional or "None" in field.description, f"{key} may be None, but its docstring does not say what None means"
