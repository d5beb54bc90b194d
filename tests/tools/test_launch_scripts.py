"""The scripts of tools/launch, as far as they can be tried without a cluster: their programs are stand-ins that note what they were given."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.mpu.environment import complete_environment

FOLDER = Path(__file__).resolve().parents[2] / "tools/launch"
SHELL_SCRIPTS = sorted(FOLDER.glob("*.sh"))
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
# Runs its command once for each task, with the variables that srun sets; two machines with two tasks each, or as --ntasks-per-node says.
SRUN = """#!/bin/bash
echo "$@" > "$NOTES/srun"
while [[ "$1" == --* ]]; do shift; done
for ((task = 0; task < 2 * TASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % TASKS)) SLURM_NODEID=$((task / TASKS)) SLURM_STEP_NUM_TASKS=$((2 * TASKS)) \\
        SLURM_STEP_TASKS_PER_NODE="$TASKS(x2)" SLURM_STEP_NODELIST="gpu[07-08]" "$@" || exit 1
done
"""
PYTHON = """#!/bin/bash
printf '%s\\n' "$@" > "$NOTES/words$SLURM_PROCID"
env > "$NOTES/environment$SLURM_PROCID"
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-ins' notes; they are the first on the PATH."""
    (programs := tmp_path / "programs").mkdir()
    for name, text in (
        ("srun", SRUN),
        ("scontrol", '#!/bin/bash\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n'),
        ("python", PYTHON),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"NOTES": tmp_path, "NEOX_PYTHON": programs / "python", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": 123456}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([str(FOLDER / script), *words], env=environment, capture_output=True, text=True, timeout=60, check=False)


def environment_of(notes: Path, task: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (notes / f"environment{task}").read_text().splitlines() if "=" in line)


def torchrun_options(words: list[str]) -> Any:
    from torch.distributed.run import parse_args

    assert words[:2] == ["-m", "torch.distributed.run"]
    return parse_args(words[2:])


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda script: script.name)
def test_the_shell_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda script: script.name)
def test_without_configuration_files(script: Path, notes: Path) -> None:
    done = run(script.name)
    assert (done.returncode, done.stderr) == (
        2,
        f"{script.name}: name the configuration files, such as: sbatch tools/launch/{script.name} -d configs 125M.yml my_setup.yml\n",
    )


def test_tasks_of_slurm_are_ranks(notes: Path) -> None:
    done = run("slurm.sh", "-d", "configs", "a b.yml", TASKS="2", SLURM_CPUS_PER_TASK="7")
    assert done.returncode == 0, done.stderr
    assert (notes / "srun").read_text().startswith("--kill-on-bad-exit=1 ")
    for task in range(4):
        environment = environment_of(notes, str(task))
        complete_environment(environment)
        ranks = [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        assert ranks == [str(task), "4", str(task % 2), "2"]
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"], environment["OMP_NUM_THREADS"]) == ("gpu07", "23456", "7")
        assert (notes / f"words{task}").read_text().splitlines() == ["-u", "train.py", "-d", "configs", "a b.yml"]


@pytest.mark.parametrize(("gpus", "processes"), [({"SLURM_GPUS_ON_NODE": "8"}, "8"), ({}, "1"), ({"NEOX_PROCESSES": "3"}, "3")])
def test_torchrun_under_slurm(notes: Path, gpus: dict[str, str], processes: str) -> None:
    done = run("slurm_torchrun.sh", "-d", "configs", "a b.yml", TASKS="1", SLURM_JOB_NUM_NODES="2", **gpus)
    assert done.returncode == 0, done.stderr
    for task in range(2):
        options = torchrun_options((notes / f"words{task}").read_text().splitlines())
        assert (options.nnodes, options.node_rank, options.nproc_per_node) == ("2", task, processes)
        assert (options.master_addr, options.master_port, options.rdzv_backend, options.max_restarts) == ("gpu07", 23456, "static", 0)
        assert (options.training_script, options.training_script_args) == ("train.py", ["-d", "configs", "a b.yml"])


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda script: script.name)
def test_a_task_that_fails_fails_the_job(script: Path, notes: Path) -> None:
    (notes / "programs/python").write_text("#!/bin/bash\nexit 3\n")
    assert run(script.name, "a.yml", TASKS="1", SLURM_JOB_NUM_NODES="2").returncode == 1


def manifest(name: str, kind: str) -> dict[str, Any]:
    return next(part for part in yaml.safe_load_all((FOLDER / name).read_text()) if part["kind"] == kind)


def words_of(container: Mapping[str, Any], notes: Path, **variables: str) -> Any:
    """The options that a pod's command gives to torchrun, where the cluster has set `variables`."""
    own = {entry["name"]: entry["value"] for entry in container["env"]}
    environment = {**os.environ, **own, **variables, "SLURM_PROCID": "0"}
    subprocess.run([*container["command"], *container["args"]], env=environment, check=True, timeout=60)
    return torchrun_options((notes / "words0").read_text().splitlines())


def test_an_indexed_job(notes: Path) -> None:
    job = manifest("kubernetes.yaml", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NNODES"])
    assert int(environment["PROCESSES"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    service = manifest("kubernetes.yaml", "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for index in range(2):
        options = words_of(container, notes, JOB_COMPLETION_INDEX=str(index))
        assert (options.nnodes, options.node_rank, options.nproc_per_node, options.master_addr) == ("2", index, "8", "neox-0.neox")
        assert options.training_script_args == ["-d", "configs", "125M.yml", "my_setup.yml"]


def test_a_pytorchjob(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun reads the variables that begin with PET_, which Kubeflow's operator sets, while it reads its options."""
    job = manifest("kubernetes_pytorchjob.yaml", "PyTorchJob")["spec"]
    replicas = job["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    assert replicas["Worker"]["template"] == replicas["Master"]["template"]
    (container,) = replicas["Worker"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert int(job["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    for name, value in {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    options = words_of(container, notes, MASTER_ADDR="neox-master-0", MASTER_PORT="23456")
    assert (options.nnodes, int(options.node_rank), options.nproc_per_node, options.master_addr) == ("2", 1, "8", "neox-master-0")


def test_every_file_is_tried_here() -> None:
    assert [file.name for file in (*SHELL_SCRIPTS, *MANIFESTS)] == ["slurm.sh", "slurm_torchrun.sh", "kubernetes.yaml", "kubernetes_pytorchjob.yaml"]
