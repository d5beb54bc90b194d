"""The launcher of one machine, in place of DeepSpeed's, and the parent of a process under torchrun: the command `tools/launch/processes.py`.

DeepSpeed's looks at its processes once a second, does not say which one died of what, and takes 3 s to import. This one sets the same variables.
torchrun does not tell who has started it which process was killed.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron.launcher.workers import Command, run_under_another, run_workers

PROGRAM = str(Path(__file__).resolve().parents[2] / "tools/launch/processes.py")
ADDRESS = "127.0.0.1"


def local_command(processes: int, port: int, worker: Sequence[str]) -> tuple[str, ...]:
    """The command that starts the words of a worker, its script first. `arguments_of` takes it apart."""
    return (sys.executable, PROGRAM, "--processes", str(processes), "--master_port", str(port), *worker)


def arguments_of(command: Sequence[str]) -> Sequence[str]:
    return command[2:]


def main(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Starts the processes and waits for them. Returns the exit status of the first that failed."""
    parser = argparse.ArgumentParser(prog=Path(PROGRAM).name, allow_abbrev=False, description="Start a script in several processes on this machine.")
    several = "how many; without it one, whose place among all the environment says (RANK and others)"
    parser.add_argument("--processes", type=int, metavar="N", help=several)
    parser.add_argument(
        "--master_port", type=int, default=29500, metavar="PORT", help="where they meet (29500); another one is taken if it is in use"
    )
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    given = parser.parse_args(list(argv))
    if given.processes is None:
        return run_under_another(Command((sys.executable, "-u", given.script, *given.arguments), environment))
    with held_port(given.master_port) as port:
        places = [place(rank, given.processes, port) for rank in range(given.processes)]
        return run_workers(
            [
                Command((sys.executable, "-u", given.script, f"--local_rank={values['RANK']}", *given.arguments), {**environment, **values})
                for values in places
            ]
        )


@contextmanager
def held_port(preferred: int) -> Iterator[int]:
    """`preferred`, or another port if it is in use. No other run takes it until the end, but the first process can listen there."""
    with socket.socket() as holder:
        try:
            holder.bind((ADDRESS, preferred))
        except OSError:
            holder.bind((ADDRESS, 0))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not before: with it, bind would share the port with another holder
        yield int(holder.getsockname()[1])


def place(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables that tell a process its place, under torchrun's names and those that DeepSpeed's launcher adds (LOCAL_SIZE, CROSS_*)."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "LOCAL_SIZE": processes}
    values = {**here, "CROSS_RANK": 0, "CROSS_SIZE": 1, "MASTER_ADDR": ADDRESS, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}
