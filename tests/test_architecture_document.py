"""What docs/architecture.md says of the code is so: every path, every dotted name, every signature, and the order of the layers."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_code_shape import LAYERS

CODE = re.compile(r"`([^`]+)`")
PATH = re.compile(r"[\w./-]*/[\w.-]*|[\w-]+\.(?:py|md|yml|jsonl)")
DOTTED = re.compile(r"([a-z_]+(?:\.\w+)+)(?:\(([\w, ]*)\)(?: -> (.+))?)?")
WRITTEN_BY_RUNS = {"metrics.jsonl", "a.yml", "b.yml", ".bin/.idx"}
"""Names of files that are not in the repository."""


def spans(root: Path) -> list[str]:
    """What stands between backticks; a bar in a table is escaped."""
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    return [span.replace(r"\|", "|") for span in CODE.findall(text)]


def paths(root: Path) -> list[str]:
    return sorted({span for span in spans(root) if PATH.fullmatch(span)} - WRITTEN_BY_RUNS)


def names(root: Path) -> list[str]:
    """Dotted names, with a signature or without."""
    return sorted({span for span in spans(root) if (match := DOTTED.fullmatch(span)) and not PATH.fullmatch(match[1])})


def resolved(dotted: str) -> Any:
    """The object of a name that starts inside the package."""
    parts = ["megatron", *dotted.split(".")]
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise AssertionError(dotted)


ROOT = Path(__file__).resolve().parent.parent


def test_there_is_enough_to_check() -> None:
    assert len(paths(ROOT)) > 70
    assert len(names(ROOT)) > 40
    assert sum("(" in name for name in names(ROOT)) > 15


@pytest.mark.parametrize("path", paths(ROOT))
def test_a_path_is_there(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "megatron" / path).exists()


@pytest.mark.parametrize("name", names(ROOT))
def test_a_name_is_there_with_its_signature(name: str) -> None:
    match = DOTTED.fullmatch(name)
    assert match is not None
    found = resolved(match[1])
    if "(" not in name:
        return
    signature = inspect.signature(found)
    wanted = [word.strip() for word in match[2].split(",") if word.strip()]
    assert [parameter for parameter in signature.parameters if parameter != "self"] == wanted
    assert str(signature.return_annotation) == match[3]


def test_every_folder_and_module_of_the_package_is_a_room() -> None:
    rooms = {span.rstrip("/") for span in spans(ROOT)}
    top = {path.name for path in (ROOT / "megatron").iterdir() if not path.name.startswith("__")}
    assert top <= rooms


def test_the_import_rule_is_the_one_that_is_tested() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("    config <"))
    said = [set(part.strip(" {}").split(", ")) for part in line.split("<")]
    assert said == LAYERS


def test_the_callback_s_moments_are_all_of_them() -> None:
    tree = ast.parse((ROOT / "megatron" / "training" / "callbacks" / "base.py").read_text(encoding="utf-8"))
    moments = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    said = {name.split("(")[0].split(".")[-1] for name in names(ROOT) if name.startswith("training.callbacks.base.Callback.")}
    assert said == moments
