"""docs/runbook-64gpu.md, typed command by command on a toy: what stands there works, and in this order.

The toy is small in every number and the same in every name. `TOY` says what is replaced in the commands. Slurm's programs are stand-ins: `srun`
starts two real processes, which train together over gloo.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_readme_commands import SHELL_BLOCK, commands_in
from tests.training.runs import outer_environment

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = ROOT / "docs/runbook-64gpu.md"
MODEL = "configs/structmoe/410M-2B-fineweb.yml"
# Every machine that tests this has done these before.
NOT_RUN = ("git clone", "cd ", "make setup-run")
TOY = {
    "prepare_data.py fineweb": "prepare_data.py parquet --name fineweb --by-file",
    "--tokens 100B": "--tokens 30k",
    "--workers 64": "--workers 1",
    "--part 1/8": "--part 1/2",
    "--gpus 64": "--gpus 2",
    "train_iters=20": "train_iters=2",
    "--eval_tasks cosmoes": f"--eval_tasks piqa --eval_data {ROOT.parent / 'shared/data/eval'} -o eval_limit=4",
    "--text sotu stdlib math": "--text sotu --tokens 300",
    "-i configs/quickstart_prompts.txt": "-i configs/quickstart_prompts.txt -o maximum_tokens=4",
}
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 2,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "moe_num_experts": 4,
    "moe_num_lores": 4,
    "moe_lore_rank": 4,
    "train_iters": 6,
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "eval_interval": 3,
    "eval_iters": 1,
    "checkpoint_factor": 2,
    "log_interval": 1,
}
# The job ends in its middle, as if its time were over. The command with the hostfile goes on.
SBATCH = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
SLURM_JOB_ID=17 SLURM_JOB_NODELIST="gpu[1-2]" exec bash "$@" -o exit_interval=3
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NODEID=$task SLURM_STEP_NUM_TASKS=2 \\
        SLURM_STEP_TASKS_PER_NODE="1(x2)" SLURM_STEP_NODELIST="gpu[1-2]" "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
SCONTROL = """#!/bin/bash
printf 'localhost\\nlocalhost\\n'
"""


def commands() -> list[str]:
    found = commands_in(RUNBOOK.read_text())
    return [command for command in found if not command.startswith(NOT_RUN)]


def toy(command: str) -> str:
    for word, replacement in TOY.items():
        command = command.replace(word, replacement)
    return re.sub(r"^python ", f"{sys.executable} ", command)


def test_every_replacement_is_used() -> None:
    """A command that changed is not run at full size, and the reader is not told of commands that are not there."""
    text = " ; ".join(commands())
    assert [word for word in TOY if word not in text] == []
    assert len(commands()) > 15
    assert len(SHELL_BLOCK.findall(RUNBOOK.read_text())) > 8


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the program with the toy in the place of the model, its settings, its data and Slurm."""
    for name in ("megatron", "configs", "tools", "prepare_data.py", "deepy.py", "train.py", "eval.py", "generate.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (settings,) = re.findall(r"```yaml\n(.*?)```", RUNBOOK.read_text(), re.DOTALL)
    (tmp_path / "configs/my_cluster.yml").write_text(json.dumps({**yaml.safe_load(settings), "num_gpus": 2, "routing_trace_interval": 5}))
    published = (ROOT / MODEL).read_text()
    header = published[: published.index("{")]  # names the vocabulary
    (tmp_path / MODEL).write_text(header + json.dumps({**yaml.safe_load(published), **SIZES}))
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    parquet(tmp_path)
    (programs := tmp_path / "programs").mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NEOX_PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def parquet(folder: Path) -> None:
    """Two parquet files like FineWeb's, and a tokenizer."""
    pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    from pyarrow.parquet import write_table
    from tokenizers import ByteLevelBPETokenizer

    texts = [f"Document {number}. " + " ".join(f"word{number * index % 97} and {index}" for index in range(60)) for number in range(80)]
    (folder / "parquet").mkdir()
    for part in range(2):
        write_table(pyarrow.table({"text": texts[part::2]}), folder / f"parquet/00{part}.parquet")
    (folder / "llama3").mkdir()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(folder / "llama3/tokenizer.json"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_runs(checkout: Path) -> None:
    said = {}
    for command in commands():
        if "cosmoes" in command and not (ROOT.parent / "shared/data/eval").is_dir():
            continue  # the tasks' data are not part of this repository
        done = subprocess.run(
            toy(command), shell=True, cwd=checkout, env=outer_environment(), capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        said[command] = done.stdout + done.stderr
    check(checkout, said)


def check(checkout: Path, said: dict[str, str]) -> None:
    """What the reader of the page would look at."""
    run = checkout / "runs/structmoe-410M-2B"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["iteration"] for record in records if "train/lm_loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6], "Slurm's job made three steps, the hosts the other three"
    assert (run / "latest").read_text().strip() == "global_step6"
    assert (checkout / "page.html").stat().st_size > 100_000
    assert (checkout / "routing").is_dir()
    assert json.loads((checkout / "structmoe-410M-2B-hf/config.json").read_text())["num_hidden_layers"] == 2
    assert any("core-hours" in text for command, text in said.items() if "--plan" in command)
