"""What is started for which configuration on which machine: pure decisions, nothing runs."""

from __future__ import annotations

import re
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config.loader import LoadedConfig, config_from_dict
from megatron.config.section import ConfigError
from megatron.config.transport import decode
from megatron.launcher.local import PROGRAM, held_port
from megatron.launcher.plan import Launch, machine_notices, plan_launch, worker_count
from megatron.launcher.processes import Machine
from megatron.launcher.reach import HINT, LaunchError
from megatron.launcher.torchrun import NODE_RANK

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
CPU, TWO_GPUS = Machine(gpus=0, cores=8), Machine(gpus=2, cores=8)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DLTS_HOSTFILE", "OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)


Stub = Callable[[str, str | None], None]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Writes a program of that name as the only thing on the PATH besides a shell; None takes it away."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name: str, script: str | None) -> None:
        (folder / name).unlink(missing_ok=True)
        if script is not None:
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return write


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


def test_two_processes_share_the_cores() -> None:
    launch = plan(num_gpus=2)
    assert not launch.replaces
    assert launch.argv[1:4] == (PROGRAM, "--processes", "2")
    assert launch.argv[6:8] == ("train.py", "--megatron_config")
    assert "CUDA_VISIBLE_DEVICES" not in launch.env
    assert launch.processes == 2
    assert launch.env["OMP_NUM_THREADS"] == "4"


def test_every_gpu_gets_a_process() -> None:
    launch = plan(TWO_GPUS)
    assert launch.processes == 2
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "DS_ACCELERATOR" not in launch.env


def test_cuda_visible_devices_is_kept() -> None:
    launch = plan(Machine(gpus=3, cores=8, visible=("5", "6", "7")), num_gpus=2)
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "5,6"


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


@pytest.fixture
def two_hosts(tmp_path: Path) -> str:
    """A hostfile with two machines of four slots."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two machines\nnode-a slots=4\nnode-b slots=4\n")
    return str(hostfile)


WORKER = [sys.executable, "-u", "train.py", "--megatron_config"]


@pytest.mark.parametrize(
    ("launcher", "program", "begins", "holds"),
    [
        ("pdsh", "pdsh", ["pdsh", "-S"], ["-w node-a,node-b", "-m deepspeed.launcher.launch", "--node_rank=%n", "--master_addr=10.0.0.1"]),
        ("openmpi", "ompi_info", ["mpirun", "-n", "8"], ["-hostfile HOSTS", "-x MASTER_ADDR=10.0.0.1", "-x MASTER_PORT=29500"]),
        ("mpich", "mpirun", ["mpirun", "-n", "8", "-ppn", "4"], ["-hosts node-a,node-b", "-genv MASTER_ADDR 10.0.0.1", "-genv WORLD_SIZE 8"]),
        ("impi", "mpirun", ["mpirun", "-ppn", "4"], ["-hosts node-a,node-b", "-genv MASTER_ADDR 10.0.0.1", "-env RANK 7 -env LOCAL_RANK 3"]),
        ("slurm", "sinfo", ["srun", "-n", "8"], ["--comment=run", "--account=me", "--kill-on-bad-exit=1", "MASTER_ADDR=10.0.0.1"]),
    ],
)
def test_the_command_for_several_machines(two_hosts: str, stub: Stub, launcher: str, program: str, begins: list[str], holds: list[str]) -> None:
    stub(program, "exit 0")
    scheduler = {"comment": "run", "account": "me"} if launcher == "slurm" else {}
    launch = plan(hostfile=two_hosts, launcher=launcher, no_ssh_check=True, master_addr="10.0.0.1", **scheduler)
    assert list(launch.argv[: len(begins)]) == begins
    assert all(part.replace("HOSTS", two_hosts) in " ".join(launch.argv) for part in holds)
    assert decode(launch.argv[-1]).config.launcher.launcher == launcher
    assert list(launch.argv[-5:-1]) == WORKER or launcher == "pdsh", "no script of DeepSpeed's between, which hides the worker's status"
    assert (launch.processes, launch.program, bool(launch.stop)) == (8, launcher, launcher == "pdsh")


def test_pdsh_stops_the_processes_of_this_run_alone(two_hosts: str, stub: Stub) -> None:
    stub("pdsh", "exit 0")
    launch = plan(hostfile=two_hosts, no_ssh_check=True, master_addr="10.0.0.1", master_port=4000)
    *_, command = launch.stop
    pattern = shlex.split(command)[-1]
    ours, others = (
        f"{sys.executable} -u -m deepspeed.launcher.launch {launch.argv[-8]} --node_rank=0 --x --master_port={port} train.py" for port in (4000, 4001)
    )
    assert "--world_info=" in launch.argv[-8]
    assert re.search(pattern, ours)
    assert not re.search(pattern, others)
    assert not re.search(pattern, f"pdsh -w a {ours}"), "nor the command that brings the word"


def test_variables_for_the_other_machines(two_hosts: str, stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub("ompi_info", "exit 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("UNRELATED", "1")
    (tmp_path / ".deepspeed_env").write_text("\nMINE=5\n")
    asked = {"hostfile": two_hosts, "launcher": "openmpi", "no_ssh_check": True, "master_addr": "10.0.0.1"}
    words = plan(**asked, threads_per_process=3).argv
    assert {"GLOO_SOCKET_IFNAME=eth7", "MINE=5", "OMP_NUM_THREADS=3", f"PYTHONPATH={tmp_path}"} <= {word.partition(":")[0] for word in words}
    assert "UNRELATED=1" not in words
    assert not [word for word in plan(**asked).argv if word.startswith("OMP_NUM_THREADS")], "this machine's cores say nothing about another's"
    (tmp_path / ".deepspeed_env").write_text("MINE 5\n")
    with pytest.raises(ConfigError, match=r"\.deepspeed_env: 'MINE 5' is no variable; write NAME=VALUE on each line"):
        plan(**asked)


def test_slurm_needs_no_ssh(two_hosts: str, stub: Stub) -> None:
    stub("sinfo", "exit 0")
    launch = plan(hostfile=two_hosts, launcher="slurm", num_gpus=2)
    assert launch.argv[:3] == ("srun", "-n", "4")
    assert not [word for word in launch.argv if "MASTER_ADDR" in word], "the tasks find the first machine in SLURM's list"


def test_one_host_that_is_another_machine_is_reached_too(tmp_path: Path, stub: Stub) -> None:
    """DeepSpeed's runner would start the processes here, where they wait for an address of the other machine."""
    stub("pdsh", "exit 0")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=2\n")
    assert plan(hostfile=str(hostfile), no_ssh_check=True, master_addr="10.0.0.1").argv[0] == "pdsh"


def test_torchrun_starts_this_machine_s_part(two_hosts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NODE_RANK:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"none of its machines is this one; say which one this is: set NODE_RANK in the environment, from 0 to 1"):
        plan(hostfile=two_hosts, launcher="torchrun")
    monkeypatch.setenv("NODE_RANK", "1")
    launch = plan(hostfile=two_hosts, launcher="torchrun", include="node-a@node-b:0,2")
    words = ("--nnodes=2", "--node-rank=1", "--nproc-per-node=2", "--max-restarts=0", "--rdzv-backend=static", "--master-addr=node-a")
    assert launch.argv[1 : 3 + len(words)] == ("-m", "torch.distributed.run", *words)
    assert (launch.processes, launch.env["OMP_NUM_THREADS"]) == (2, "4")
    assert plan(TWO_GPUS, hostfile=two_hosts, launcher="torchrun", include="node-a@node-b:1").env["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(ConfigError, match=r"NODE_RANK is 2 in the environment, but .*hosts names 2 machine\(s\), from 0 to 1"):
        plan(hostfile=two_hosts, launcher="torchrun")
    monkeypatch.delenv("NODE_RANK")
    mine = tmp_path / "mine"
    mine.write_text("node-a slots=2\n127.0.0.2 slots=3\n")
    assert "--node-rank=1" in plan(hostfile=str(mine), launcher="torchrun").argv, "an address of this machine"
    mine.write_text("127.0.0.1 slots=2\n127.0.0.2 slots=3\n")
    with pytest.raises(ConfigError, match=r"127.0.0.1 and 127.0.0.2 are all this machine"):
        plan(hostfile=str(mine), launcher="torchrun")


def test_slots_of_the_hostfile_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("worker-1 slots=4\nworker-2 slots=8 # large\n")
    assert worker_count(loaded(hostfile=str(hostfile)), CPU) == 12
    assert worker_count(loaded(hostfile=str(hostfile), num_nodes=1), CPU) == 4
    monkeypatch.setenv("DLTS_HOSTFILE", str(hostfile))
    assert worker_count(loaded(), CPU) == 12
    hostfile.write_text("worker-1 slots=4\nworker-1 slots=4\n")
    with pytest.raises(ConfigError, match=r"hosts:2: Hostfile contains multiple entries for worker-1"):
        worker_count(loaded(), CPU)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("node-a slots=2\nnode-b slots=two\n", ":2", "Hostfile contains a bad entry: node-b slots=two; write one line for each machine"),
        ("worker-1\n", ":1", "Hostfile contains a bad entry: worker-1; write one line for each machine, such as `worker-1 slots=8`"),
        ("# one\n\nnode-a slots=2\n# two\nnode-a slots=2\n", ":5", "Hostfile contains multiple entries for node-a; write one line for each machine"),
        ("", "", "Hostfile is empty or not formatted correctly; write one line for each machine"),
        ("# nothing\n\n", "", "Hostfile is empty or not formatted correctly"),
        ("node-a slots=4\nnode-b slots=0\n", ":2", "node-b has slots=0, so no process would start there; write 1 or more"),
        ("node-a slots = 4\n", ":1", "Hostfile contains a bad entry: node-a slots = 4"),
    ],
)
def test_what_deepspeed_refuses_of_a_hostfile_is_a_sentence_with_its_line(tmp_path: Path, text: str, place: str, said: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    for call in (worker_count, lambda config, machine: plan_launch(Path("train.py"), config, machine)):
        with pytest.raises(ConfigError) as caught:
            call(loaded(hostfile=str(hostfile)), CPU)
        assert caught.value.problems[0].startswith(f"{hostfile}{place}: {said}")


def test_a_hostfile_with_tabs_carriage_returns_and_a_byte_order_mark(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_bytes(b"\xef\xbb\xbf  node-a\tslots=4 \r\n\r\nnode-b   slots=2 max_slots=4\r\n")
    assert worker_count(loaded(hostfile=str(hostfile)), CPU) == 6
    hostfile.write_bytes(b"caf\xe9 slots=1\n")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 3\)"):
        worker_count(loaded(hostfile=str(hostfile)), CPU)
    with pytest.raises(ConfigError, match=r"'hostfile' = '.*': is a folder; name the file in it"):
        worker_count(loaded(hostfile=str(tmp_path)), CPU)


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({}, 8),
        ({"include": "node-a:0,2"}, 2),
        ({"include": "node-b@node-a:1"}, 5),
        ({"exclude": "node-a"}, 4),
        ({"exclude": "node-b:0"}, 7),
        ({"num_nodes": 1}, 4),
        ({"num_nodes": 2, "num_gpus": 3}, 6),
        ({"num_nodes": 5, "num_gpus": 6}, 12),
        ({"global_num_gpus": 8}, 8),
    ],
)
def test_the_processes_that_deepspeed_would_start_are_counted(tmp_path: Path, keys: dict[str, Any], count: int) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=4\nnode-b slots=4\n")
    assert worker_count(loaded(hostfile=str(hostfile), **keys), CPU) == count


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"include": "node-c"}, "'include' = 'node-c': Hostname 'node-c' is not in HOSTS; there is: node-a, node-b"),
        ({"include": "node-a:4"}, "'include' = 'node-a:4': No slot '4' specified on host 'node-a'; there are: node-a 0 to 3, node-b 0 to 3"),
        ({"include": "node-a:x"}, "'include' = 'node-a:x': cannot be read (invalid literal for int() with base 10: 'x'); DeepSpeed's syntax is HOST"),
        ({"exclude": "node-a:0:1"}, "'exclude' = 'node-a:0:1': cannot be read (too many values to unpack"),
        ({"exclude": "node-a@node-b"}, "'exclude': no slot is left on any machine, so no process would start; change it"),
        ({"include": "node-a", "num_gpus": 2}, "'include' and 'num_gpus': DeepSpeed takes only one of them; remove the other"),
        ({"exclude": "node-a", "num_nodes": 1}, "'exclude' and 'num_nodes': DeepSpeed takes only one of them; remove the other"),
        ({"global_num_gpus": 16}, "'global_num_gpus' = 16: 8 process(es) would start on HOSTS; make the numbers agree"),
    ],
)
def test_what_deepspeed_refuses_of_filters_and_counts_is_a_sentence(tmp_path: Path, keys: dict[str, Any], problem: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=4\nnode-b slots=4\n")
    with pytest.raises(ConfigError) as caught:
        worker_count(loaded(hostfile=str(hostfile), **keys), CPU)
    assert caught.value.problems[0].startswith(problem.replace("HOSTS", str(hostfile)))


def test_filters_and_several_machines_without_a_hostfile() -> None:
    assert worker_count(loaded(include="localhost:1"), TWO_GPUS) == 1
    with pytest.raises(ConfigError, match="No slot '5' specified on host 'localhost'; there are: localhost 0 to 1"):
        worker_count(loaded(include="localhost:5"), TWO_GPUS)
    with pytest.raises(ConfigError, match="Hostname 'worker-1' is not this machine, and there is no hostfile; there is: localhost"):
        worker_count(loaded(include="worker-1"), TWO_GPUS)
    with pytest.raises(ConfigError, match="'num_nodes' = 2: there is no hostfile with other machines"):
        worker_count(loaded(num_nodes=2), CPU)


def test_a_hostfile_that_names_this_machine_alone_needs_no_ssh(tmp_path: Path, stub: Stub) -> None:
    stub("ssh", "exit 255")
    hostfile = tmp_path / "hosts"
    for name in ("localhost", socket.gethostname()):
        hostfile.write_text(f"{name} slots=4\n")
        launch = plan(hostfile=str(hostfile), include=f"{name}:1,3")
        assert launch.argv[1:4] == (PROGRAM, "--processes", "2")
        assert launch.slots == {"localhost": [1, 3]}
        assert (launch.processes, launch.env["OMP_NUM_THREADS"]) == (2, "4")


def test_machines_that_cannot_be_reached_are_named(tmp_path: Path, stub: Stub) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=4\nnode-b slots=4\nnode-c slots=4\n")
    stub("pdsh", "exit 0")
    stub("ssh", 'case "$*" in *node-b*) echo "ssh: connect to host node-b port 22: Connection refused" >&2; exit 255;; esac; echo 10.0.0.7 10.0.0.8')
    with pytest.raises(LaunchError) as caught:
        plan(hostfile=str(hostfile))
    first, last = str(caught.value).splitlines()
    assert first.startswith(f"{hostfile}: node-b cannot be reached: `ssh -o PasswordAuthentication=no ")
    assert first.endswith(" node-b hostname` ended with status 255 (ssh: connect to host node-b port 22: Connection refused)")
    assert last == f"For each: {HINT}."
    launch = plan(hostfile=str(hostfile), exclude="node-b")
    assert "--master_addr=10.0.0.7" in launch.argv
    hostfile.write_text("10.0.0.3 slots=4\nnode-c slots=4\n")
    assert "--master_addr=10.0.0.3" in plan(hostfile=str(hostfile)).argv, "an address need not be asked for"
    hostfile.write_text("node-a slots=4\nnode-c slots=4\n")
    stub("ssh", "exit 0")
    with pytest.raises(LaunchError, match=r"node-a gives no address .*; set master_addr to its address"):
        plan(hostfile=str(hostfile))
    stub("ssh", None)
    with pytest.raises(LaunchError, match="ssh is not installed on this machine"):
        plan(hostfile=str(hostfile))


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mvapich", "mpich", "impi", "slurm"])
def test_a_launcher_whose_program_is_missing(tmp_path: Path, stub: Stub, launcher: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=4\nnode-b slots=4\n")
    stub("ssh", "echo 10.0.0.7")
    missing = f"'launcher' = '{launcher}': the program is not installed on this machine; install it, or choose another launcher"
    with pytest.raises(ConfigError) as caught:
        plan(hostfile=str(hostfile), launcher=launcher)
    assert caught.value.problems == [missing]
    assert machine_notices(loaded(hostfile=str(hostfile), launcher=launcher), CPU) == [missing]


def test_what_a_launcher_does_not_take_and_counts_that_are_not_there_are_said(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=4\nnode-b slots=4\n")
    with pytest.raises(ConfigError, match="'launcher' = 'openmpi': openmpi backend does not support worker include/exclusion"):
        machine_notices(loaded(hostfile=str(hostfile), launcher="openmpi", include="node-a@node-b:0"), CPU)
    with pytest.raises(ConfigError, match="'launcher' = 'slurm': slurm backend needs the same slot count on every host"):
        machine_notices(loaded(hostfile=str(hostfile), launcher="slurm", include="node-a@node-b:0"), CPU)
    hostfile.write_text("node-a slots=4\nnode-b slots=3\n")
    with pytest.raises(ConfigError, match="'launcher' = 'mpich': MPICH requires same number of devices per node"):
        machine_notices(loaded(hostfile=str(hostfile), launcher="mpich"), CPU)
    hostfile.write_text("node-a slots=4\nnode-b slots=4\n")
    said = machine_notices(loaded(hostfile=str(hostfile), comment="mine"), CPU)
    assert said[0] == "'comment' is for SLURM's scheduler, and 'launcher' = 'pdsh' has none"
    notices = machine_notices(loaded(hostfile=str(hostfile), num_nodes=3, num_gpus=6), CPU)
    assert notices[0] == f"'num_nodes' = 3: {hostfile} names 2 machine(s), and all of them are used"
    assert notices[1].startswith(f"'num_gpus' = 6: more than the slots of node-a (4), node-b (4) in {hostfile}; DeepSpeed starts 6 on each")


def test_a_hostfile_that_is_not_there_means_this_machine() -> None:
    assert plan(hostfile="/mock_path").replaces


def test_filters_on_this_machine() -> None:
    launch = plan(TWO_GPUS, include="localhost:1")
    assert (launch.replaces, launch.slots, launch.env["CUDA_VISIBLE_DEVICES"]) == (True, {"localhost": [1]}, "1")


def test_two_runs_that_start_together_get_two_ports() -> None:
    """The port is taken from the moment of the start, and not only once a process listens there."""
    with held_port(0) as first:
        with held_port(first) as second:
            assert second not in (first, 0)
        with socket.create_server(("", first)) as process:
            assert process.getsockname()[1] == first
    with held_port(first) as again:
        assert again == first


def test_what_is_asked_for_about_machines_and_not_done_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("worker-1 slots=4\n")
    alone = "there is no hostfile, so only this machine is used; give a hostfile, or write force_multi: true"
    missing = f"= '{tmp_path}/none': no such file, so only this machine is used"
    assert machine_notices(loaded(hostfile=str(hostfile), launcher="slurm")) == machine_notices(loaded()) == []
    assert machine_notices(loaded(launcher="openmpi", force_multi=True)) == []
    assert machine_notices(loaded(deepspeed_slurm=True)) == [f"'launcher' = 'slurm': {alone}"]
    assert machine_notices(loaded(hostfile=f"{tmp_path}/none")) == [f"'hostfile' {missing}"]
    monkeypatch.setenv("DLTS_HOSTFILE", f"{tmp_path}/none")
    assert machine_notices(loaded(hostfile=str(hostfile))) == []
    assert machine_notices(loaded()) == [f"DLTS_HOSTFILE {missing}"]
