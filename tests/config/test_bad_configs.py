"""Mistakes as people make them, each told by the real `deepy.py --check` in a process of its own: the table is bad_configs.yml, word for word."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.scripts import run_script

BASE = {"hidden_size": 64, "max_position_embeddings": 32, "num_attention_heads": 4, "num_layers": 2, "seq_length": 32}
CASES: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("bad_configs.yml").read_text())


def check(case: dict[str, Any], folder: Path, repository: Path) -> subprocess.CompletedProcess[str]:
    """What deepy.py --check says in a folder with the case's files; `slim.yml` is the model without the keys that they have."""
    files: dict[str, str | bytes] = case.get("files", {})
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    given = {line.split(":")[0].strip('"').replace("-", "_") for text in files.values() if isinstance(text, str) for line in text.splitlines()}
    (folder / "base.yml").write_text(yaml.safe_dump(BASE))
    (folder / "slim.yml").write_text(yaml.safe_dump({key: value for key, value in BASE.items() if key not in given}))
    environment = {**os.environ, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DLTS_HOSTFILE", None)
    words = [str(repository / "train.py"), "--check", *case.get("words", ["base", "a"])]
    return run_script("deepy.py", *words, folder=folder, environment=environment, timeout=120)


def test_the_table_has_what_was_promised() -> None:
    assert len({case["what"] for case in CASES}) == len(CASES) >= 40
    assert len({problem for case in CASES for problem in case["problems"]}) >= len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
def test_deepy_says_exactly_this(case: dict[str, Any], tmp_path: Path, repository: Path) -> None:
    done = check(case, tmp_path, repository)
    problems = "".join(f"  {problem}\n" for problem in case["problems"])
    assert done.stderr == f"deepy.py: {len(case['problems'])} problem(s) in the configuration:\n{problems}"
    assert done.stdout == ""
    assert done.returncode == 2


def test_the_model_alone_passes(tmp_path: Path, repository: Path) -> None:
    done = check({"files": {"a.yml": "seed: 1\n"}}, tmp_path, repository)
    assert done.returncode == 0, done.stderr
    assert "Given in base.yml, a.yml" in done.stdout
