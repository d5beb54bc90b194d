"""What is started for which configuration on which machine: pure decisions, nothing runs."""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron.config.loader import LoadedConfig, config_from_dict
from megatron.config.section import ConfigError
from megatron.config.transport import decode
from megatron.launcher.plan import Launch, machine_notices, plan_launch, worker_count
from megatron.launcher.processes import Machine, free_port

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
CPU, TWO_GPUS = Machine(gpus=0, cores=8), Machine(gpus=2, cores=8)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DLTS_HOSTFILE", "OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)


def loaded(**keys: Any) -> LoadedConfig:
    return LoadedConfig(config_from_dict({**MODEL, **keys}))


def plan(machine: Machine = CPU, **keys: Any) -> Launch:
    return plan_launch(Path("train.py"), loaded(**keys), machine)


def test_one_process_needs_no_launcher() -> None:
    launch = plan()
    assert launch.replaces
    assert launch.argv[1:3] == ("train.py", "--megatron_config")
    assert decode(launch.argv[3]) == loaded()
    assert launch.env["DS_ACCELERATOR"] == "cpu"
    assert launch.env["OMP_NUM_THREADS"] == "8"


def test_two_processes_share_the_cores_under_deepspeed_s_launcher() -> None:
    launch = plan(num_gpus=2)
    assert not launch.replaces
    assert launch.argv[1:3] == ("-m", "deepspeed.launcher.launch")
    world = launch.argv[launch.argv.index("--world_info") + 1]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": [0, 1]}
    assert launch.processes == 2
    assert launch.env["OMP_NUM_THREADS"] == "4"


def test_every_gpu_gets_a_process() -> None:
    launch = plan(TWO_GPUS)
    assert launch.processes == 2
    assert "DS_ACCELERATOR" not in launch.env


def test_cuda_visible_devices_is_kept() -> None:
    launch = plan(Machine(gpus=3, cores=8, visible=("5", "6", "7")), num_gpus=2)
    world = launch.argv[launch.argv.index("--world_info") + 1]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": [5, 6]}


def test_what_the_user_has_set_stays_but_the_configuration_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert plan().env["OMP_NUM_THREADS"] == "3"
    assert plan(threads_per_process=5).env["OMP_NUM_THREADS"] == "5"


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        worker_count(loaded(num_gpus=4), TWO_GPUS)
    assert caught.value.problems == ["'num_gpus' = 4: this machine has 2 GPU(s) to use"]


def test_two_counts_that_contradict_each_other() -> None:
    assert worker_count(loaded(global_num_gpus=3), CPU) == 3
    with pytest.raises(ConfigError) as caught:
        worker_count(loaded(num_gpus=2, global_num_gpus=3), CPU)
    assert caught.value.problems == ["'global_num_gpus' = 3: num_gpus is 2; on one machine give only one of them"]


def test_a_hostfile_goes_to_deepspeed_s_runner(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import parse_args

    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two machines\nworker-1 slots=4\nworker-2 slots=4\n")
    launch = plan(hostfile=str(hostfile), launcher="slurm", comment="run", account="me", no_ssh_check=True, master_addr="10.0.0.1", num_gpus=2)
    assert launch.argv[1:3] == ("-m", "deepspeed.launcher.runner")
    options = parse_args(list(launch.argv[3:]))
    assert (options.hostfile, options.launcher, options.launcher_args) == (str(hostfile), "slurm", "--comment=run --account=me")
    assert (options.no_ssh_check, options.force_multi, options.master_addr, options.num_gpus) == (True, False, "10.0.0.1", 2)
    assert (options.user_script, options.user_args[0]) == ("train.py", "--megatron_config")
    assert launch.processes == 4


def test_slots_of_the_hostfile_are_counted(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("worker-1 slots=4\nworker-2 slots=8 # large\n")
    assert worker_count(loaded(hostfile=str(hostfile)), CPU) == 12
    assert worker_count(loaded(hostfile=str(hostfile), num_nodes=1), CPU) == 4
    hostfile.write_text("worker-1\n")
    with pytest.raises(ConfigError, match="has no line such as `worker-1 slots=8`"):
        worker_count(loaded(hostfile=str(hostfile)), CPU)


def test_a_hostfile_that_is_not_there_means_this_machine() -> None:
    assert plan(hostfile="/mock_path").replaces


def test_filters_go_to_deepspeed_s_runner() -> None:
    launch = plan(TWO_GPUS, include="localhost:1")
    assert launch.argv[1:3] == ("-m", "deepspeed.launcher.runner")
    assert launch.argv[launch.argv.index("--include") + 1] == "localhost:1"


def test_a_busy_port_is_left_alone() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        assert free_port(taken) not in (taken, 0)
    assert free_port(taken) == taken


def test_what_is_asked_for_about_machines_and_not_done_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("worker-1 slots=4\n")
    alone = "there is no hostfile, so this machine alone is used; give one, or force_multi: true"
    missing = f"= '{tmp_path}/none': no such file; this machine alone is used"
    assert machine_notices(loaded(hostfile=str(hostfile), launcher="slurm")) == machine_notices(loaded()) == []
    assert machine_notices(loaded(launcher="openmpi", force_multi=True)) == []
    assert machine_notices(loaded(deepspeed_slurm=True)) == [f"'launcher' = 'slurm': {alone}"]
    assert machine_notices(loaded(hostfile=f"{tmp_path}/none")) == [f"'hostfile' {missing}"]
    monkeypatch.setenv("DLTS_HOSTFILE", f"{tmp_path}/none")
    assert machine_notices(loaded(hostfile=str(hostfile))) == []
    assert machine_notices(loaded()) == [f"DLTS_HOSTFILE {missing}"]
