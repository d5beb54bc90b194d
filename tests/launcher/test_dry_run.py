"""`deepy.py ... --dry-run`: the command and each machine's environment are shown, nothing is started, nobody is asked."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.launcher import main
from megatron.launcher.command_line import config_from_argv
from megatron.launcher.local import PROGRAM

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH; each program in it notes that it was called."""
    (folder := tmp_path / "programs").mkdir()
    for name in ("ssh", "pdsh", "mpirun", "ompi_info", "srun", "sinfo"):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n')
        (folder / name).chmod(0o755)
    for name in ("DLTS_HOSTFILE", "OMP_NUM_THREADS", "NODE_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], **keys: object) -> list[str]:
    (tmp_path / "a.json").write_text(json.dumps({**MODEL, **keys}))
    assert main(["generate.py", str(tmp_path / "a.json"), "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("launcher", "program", "source"), [("pdsh", "pdsh", ""), ("openmpi", "mpirun", "OMPI_COMM_WORLD_RANK"), ("slurm", "srun", "SLURM_PROCID")]
)
def test_several_machines(tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str], launcher: str, program: str, source: str) -> None:
    (tmp_path / "hosts").write_text("node-a slots=2\nnode-b slots=2\n")
    lines = shown(tmp_path, capsys, hostfile=str(tmp_path / "hosts"), launcher=launcher, master_port=4321)
    assert lines[0] == "4 processes on 2 machines. Nothing is started."
    command = shlex.split(lines[3])
    assert (command[0], command[-2]) == (program, "--megatron_config")
    machines = [lines.index(f"node-{name}: ranks {ranks}") for name, ranks in (("a", "0..1"), ("b", "2..3"))]
    for place, ranks in zip(machines, ("0..1", "2..3"), strict=True):
        values = lines[place + 1 : place + 6]
        assert values[:2] == ["  WORLD_SIZE=4", "  LOCAL_WORLD_SIZE=2"]
        assert values[2] == ("  MASTER_ADDR=(the first machine of SLURM's list)" if launcher == "slurm" else "  MASTER_ADDR=node-a")
        assert values[3:] == ["  MASTER_PORT=4321", f"  RANK={ranks} LOCAL_RANK=0..1" + (f"   (read from {source})" if source else "")]
    assert not (tmp_path / "called").exists() or "ssh" not in (tmp_path / "called").read_text()


def test_one_machine(tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(tmp_path, capsys, num_gpus=2, threads_per_process=3)
    assert lines[0] == "2 processes on 1 machine. Nothing is started."
    assert shlex.split(lines[3])[1:4] == [PROGRAM, "--processes", "2"]
    assert "  OMP_NUM_THREADS=3" in lines
    assert lines[-5:] == ["  WORLD_SIZE=2", "  LOCAL_WORLD_SIZE=2", "  MASTER_ADDR=127.0.0.1", lines[-2], "  RANK=0..1 LOCAL_RANK=0..1"]
    lines = shown(tmp_path, capsys)
    assert lines[0] == "1 process on 1 machine. Nothing is started."
    assert shlex.split(lines[3])[:2] == [sys.executable, shlex.split(lines[3])[1]]
    assert lines[-1].startswith("  the process sets RANK=0 WORLD_SIZE=1")


@pytest.mark.slow
def test_the_environment_that_is_shown_is_the_one_that_the_process_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that is shown is run here; the script prints its environment."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DLTS_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    (tmp_path / "a.json").write_text(json.dumps({**MODEL, "num_gpus": 2, "launcher": "torchrun", "force_multi": True}))
    script = tmp_path / "script.py"
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK")
    script.write_text(
        f"import os\nfrom pathlib import Path\nPath(__file__).with_name(os.environ['RANK']).write_text(' '.join(os.environ[n] for n in {names}))\n"
    )
    assert main([str(script), str(tmp_path / "a.json"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    subprocess.run(shlex.split(lines[3]), env=dict(os.environ), check=True, timeout=100)
    values = dict(line.strip().split("=", 1) for line in lines[-5:-1])
    assert lines[-1] == "  RANK=0..1 LOCAL_RANK=0..1"
    for rank in "01":
        assert (tmp_path / rank).read_text().split() == [*values.values(), rank, rank]


def test_the_flag_is_deepy_s_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_from_argv(["a.yml", "--dry-run"])
    assert "unrecognized arguments: --dry-run" in capsys.readouterr().err
