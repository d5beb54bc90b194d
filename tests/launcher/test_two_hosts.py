"""Two hosts, that are two loopback addresses or two network namespaces of this machine, each with its own launcher: nothing is reached over ssh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.scripts import REPOSITORY
from tests.training.runs import losses_of, outer_environment, run_values

STEPS = 5


def train(file: Path, places: Sequence[tuple[list[str], dict[str, str]]]) -> None:
    """One `deepy.py train.py` for each place: the words that come before the command, and variables. All of them have to end well."""
    processes = []
    for number, (words, variables) in enumerate(places):
        with (file.parent / f"log{number}.txt").open("w") as log:
            command = [*words, sys.executable, str(REPOSITORY / "deepy.py"), "train.py", str(file)]
            environment = {**outer_environment(), **variables}
            processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        statuses = [process.wait(400) for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.terminate()
    assert statuses == [0] * len(places), "\n".join((file.parent / f"log{number}.txt").read_text() for number in range(len(places)))


def write(folder: Path, corpus: Path, hosts: Sequence[str], **keys: object) -> Path:
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    own = {"hostfile": str(folder / "hosts"), "launcher": "torchrun", "train_iters": STEPS, "eval_iters": 0, "train_micro_batch_size_per_gpu": 2}
    (folder / "run.json").write_text(json.dumps(run_values(corpus, folder / "save", **own, **keys)))
    return folder / "run.json"


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two processes under one launcher."""
    folder = tmp_path_factory.mktemp("one_host")
    values = run_values(corpus, folder / "save", train_iters=STEPS, eval_iters=0, train_micro_batch_size_per_gpu=2, num_gpus=2)
    (folder / "run.json").write_text(json.dumps(values))
    train(folder / "run.json", [([], {})])
    return losses_of(folder / "save/metrics.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_loopback_addresses(corpus: Path, tmp_path: Path, expected: list[float]) -> None:
    file = write(tmp_path, corpus, ["127.0.0.1", "127.0.0.2"], master_port=29631)
    train(file, [([], {"NODE_RANK": "0"}), ([], {"NODE_RANK": "1"})])
    assert losses_of(tmp_path / "save/metrics.jsonl") == expected


@pytest.fixture
def namespaces() -> Iterator[dict[str, str]]:
    """Two network namespaces that see only each other: their names, with their addresses."""
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    names = {f"nx{os.getpid()}a": "10.213.7.1", f"nx{os.getpid()}b": "10.213.7.2"}
    (one, two), run = names, lambda *words: subprocess.run([ip, *words], check=True, capture_output=True)
    try:
        try:
            for name in names:
                run("netns", "add", name)
            run("link", "add", "veth-nx", "netns", one, "type", "veth", "peer", "name", "veth-nx", "netns", two)
            for name, address in names.items():
                run("-n", name, "addr", "add", f"{address}/24", "dev", "veth-nx")
                run("-n", name, "link", "set", "veth-nx", "up")
                run("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this system makes no network namespaces: {error.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_network_namespaces(corpus: Path, tmp_path: Path, expected: list[float], namespaces: dict[str, str]) -> None:
    """Each launcher finds its own line of the hostfile by its address."""
    file = write(tmp_path, corpus, list(namespaces.values()))
    train(file, [(["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": "veth-nx"}) for name in namespaces])
    assert losses_of(tmp_path / "save/metrics.jsonl") == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun is installed")
def test_an_mpi_on_this_machine(corpus: Path, tmp_path: Path, expected: list[float]) -> None:
    """mpirun starts train.py itself, without deepy.py: the ranks are read from the MPI's variables."""
    values = run_values(corpus, tmp_path / "save", train_iters=STEPS, eval_iters=0, train_micro_batch_size_per_gpu=2, master_port=29632)
    (tmp_path / "run.json").write_text(json.dumps(values))
    allowed = {f"{name}{end}": "1" for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT") for end in ("", "_CONFIRM")}
    command = ["mpirun", "-n", "2", sys.executable, str(REPOSITORY / "train.py"), str(tmp_path / "run.json")]
    done = subprocess.run(command, env={**outer_environment(), **allowed}, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(tmp_path / "save/metrics.jsonl") == expected
