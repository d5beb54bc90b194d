"""tools/analysis/size.py as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.configs.published import FIGURES
from tests.configs.test_shipped import FILES

PAPERS = [name for name in FILES if name.split("/")[0] in ("cosmoes", "structmoe") and "local_experts" not in name] + ["mixtral/8x7B.yml"]
# The interpreter fails where PyTorch is imported.
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, "tools/analysis/size.py", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=False)


def test_the_papers_models_in_one_table(repository: Path) -> None:
    done = run(repository, *(f"configs/{name}" for name in PAPERS))
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.split("\n\n")[0].splitlines()}
    for name in PAPERS:
        total, active = (int(rows[f"configs/{name}"][column].replace(",", "")) for column in (2, 3))
        for published in FIGURES[name]:
            if published.counted in ("all", "active"):
                assert (total if published.counted == "all" else active) == pytest.approx(published.figure, rel=max(published.tolerance, 1e-9))


def test_a_model_of_400_billion(repository: Path) -> None:
    done = run(repository, "configs/llama3.1/405B.yml", "--processes", "512", "--zero", "3")
    assert done.returncode == 0, done.stderr
    assert "405,853,388,800" in done.stdout
    assert "in each of 512 processes" in done.stdout


def test_match(repository: Path) -> None:
    done = run(repository, "configs/structmoe/410M-matched-8x8x128.yml", "--match", "configs/structmoe/410M-13experts-fineweb.yml")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("moe_")]
    assert rows == [
        [key, value, "2,982,545,408", "+1,449,984", "+0"]
        for key, value in (("moe_lore_rank", "128"), ("moe_num_lores", "8"), ("moe_num_experts", "8"))
    ]


def test_active_match(repository: Path) -> None:
    done = run(repository, "configs/mixtral/8x7B.yml", "--match", "configs/llama2/13B.yml", "--active")
    assert "(active parameters)" in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("moe_")] == [["moe_top_k", "2"]]


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["configs/nowhere.yml"], 2, "configs/nowhere.yml: no such file"),
        (["configs/slurm.yml"], 2, "'num_layers' must be given"),
        (["configs/19M.yml", "--match", "configs/49M.yml"], 2, "has no experts, so it has no key (number of experts"),
        (["configs/19M.yml", "--vocab", "many"], 2, "must be a whole number of 1 or more, not 'many'"),
        (["configs/19M.yml", "--processes", "0"], 2, "must be a whole number of 1 or more, not '0'"),
        (["configs/19M.yml", "--zero", "4"], 2, "invalid choice"),
        (["configs/19M.yml", "--active"], 2, "give --match OTHER too"),
    ],
)
def test_mistakes_are_sentences(arguments: list[str], status: int, sentence: str, repository: Path) -> None:
    done = run(repository, *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert sentence in done.stderr
