"""Which process this is, from what launchers leave in the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.mpu.environment import LaunchError, complete_environment
from tests.scripts import run_script

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3"}
WORKER = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def completed(environment: dict[str, str], **keys: object) -> list[str]:
    environment = dict(environment)
    complete_environment(environment, **keys)  # type: ignore[arg-type]
    again = dict(environment)
    complete_environment(again)
    assert again == environment, "it may be completed more than once"
    return [environment[name] for name in NAMES]


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_process_alone_is_rank_0_of_1(given: dict[str, str]) -> None:
    *rest, port = completed(given)
    assert rest == ["0", "1", "0", "1", "127.0.0.1"]
    assert 1024 <= int(port) < 65536


def test_what_a_launcher_said_stays() -> None:
    assert completed(WORKER) == [WORKER[name] for name in NAMES]
    deepspeed_s = {key: value for key, value in WORKER.items() if key != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "3"} | SRUN
    assert completed(deepspeed_s) == [{**WORKER, "LOCAL_WORLD_SIZE": "3"}[name] for name in NAMES]


def test_one_process_of_one_needs_no_place_to_meet() -> None:
    assert completed({"RANK": "0", "WORLD_SIZE": "1"})[:5] == ["0", "1", "0", "1", "127.0.0.1"]


@pytest.mark.parametrize(
    ("more", "address"),
    [
        ({"SLURM_STEP_NODELIST": "gpu[03-05,9],login"}, "gpu03"),
        ({"SLURM_STEP_NODELIST": "a-1,b"}, "a-1"),
        ({"MASTER_ADDR": "10.0.0.1", "SLURM_STEP_NODELIST": "b"}, "10.0.0.1"),
    ],
)
def test_tasks_of_srun_are_ranks(more: dict[str, str], address: str) -> None:
    assert completed(SRUN | more, master_port=2222) == ["5", "7", "1", "3", address, "2222"]


def test_equal_counts_of_slurm() -> None:
    assert completed(SRUN | {"SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, master_addr="m")[3] == "2"


@pytest.mark.parametrize("prefix", ["OMPI_COMM_WORLD_", "MV2_COMM_WORLD_"])
def test_processes_of_an_mpi_are_ranks(prefix: str) -> None:
    given = {"RANK": "2", "SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    assert completed({prefix + key: value for key, value in given.items()}, master_addr="m") == ["2", "4", "0", "2", "m", "29500"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "0"}, "RANK is '0' in the environment, but WORLD_SIZE is missing; set both, or neither of them for one process"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is '4' in the environment, but RANK is missing; set both, or neither of them for one process"),
        ({**WORKER, "RANK": "one"}, "RANK is 'one' in the environment: it must be a number. The launcher sets it"),
        ({**WORKER, "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1' in the environment: it must be a number. The launcher sets it"),
        ({**WORKER, "RANK": "4"}, "RANK is 4 in the environment: it must be from 0 to 3, because WORLD_SIZE is 4"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            "WORLD_SIZE is 2 in the environment, but MASTER_ADDR is missing; deepy.py and torchrun set all of them",
        ),
        (SRUN, "srun started 7 processes but gave no address where they can meet; set master_addr or MASTER_ADDR"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is '2' in the environment, as srun sets it, but SLURM_PROCID is missing"),
        (SRUN | {"SLURM_NODEID": "9"}, "SLURM_STEP_TASKS_PER_NODE is '4,3' in the environment, but it has no number for SLURM_NODEID 9"),
    ],
)
def test_half_an_environment_is_a_sentence(given: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        completed(given)
    assert str(caught.value) == message


@pytest.mark.parametrize("script", ["train.py", "eval.py", "generate.py"])
def test_a_script_says_the_sentence(script: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in NAMES} | {"RANK": "0"}
    process = run_script(script, "configs/quickstart.yml", folder=ROOT, environment=environment, timeout=60, outputs=tmp_path)
    assert (process.returncode, process.stderr) == (
        1,
        "RANK is '0' in the environment, but WORLD_SIZE is missing; set both, or neither of them for one process\n",
    )


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
        ("MVP_COMM_WORLD_RANK", "MVP_COMM_WORLD_SIZE", "MVP_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ],
    ids=lambda names: names[0],
)
def test_where_processes_of_an_mpi_meet(names: tuple[str, ...]) -> None:
    several = dict(zip(names, ("3", "4", "1", "2"), strict=True))
    assert completed(several | {"MASTER_ADDR": "10.0.0.1"}, master_port=2222) == ["3", "4", "1", "2", "10.0.0.1", "2222"]
    assert completed(several | {"SLURM_JOB_NODELIST": "gpu[07,09]"})[4] == "gpu07", "an MPI in an allocation of SLURM's"
    with pytest.raises(LaunchError, match="gave no address where they can meet; set master_addr or MASTER_ADDR"):
        complete_environment(dict(several))
    assert completed(several | {names[3]: "4"})[4] == "127.0.0.1", "all of them are on this machine"
