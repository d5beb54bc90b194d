"""This process among the others: device, threads, process group."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import warnings

import torch

from megatron.mpu.topology import Topology, current_topology


def start_process(*, backend: str | None, threads: int | None) -> Topology:
    """Joins the other processes (or makes a group of one) through DeepSpeed and returns the topology.

    `backend` None: nccl where there is a GPU, else gloo; nccl without a GPU becomes gloo.
    `threads` None: this machine's cores divided by its processes.
    """
    choose_accelerator()
    single_process_defaults(os.environ)
    torch.set_num_threads(threads or max(1, _cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    import deepspeed

    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)  # DeepSpeed's calls, not the user's
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("LOGLEVEL", "WARNING").upper())
    decline_compiled_collectives()
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend=choose_backend(backend), auto_mpi_discovery=False, verbose=False)
        atexit.register(end_process)
    return current_topology()


def choose_accelerator() -> None:
    """Tells DeepSpeed what to run on, before its first import: it looks around, and warns, when nobody says so."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def end_process() -> None:
    """Leaves the process group, so that the interpreter can end without a warning."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def choose_backend(requested: str | None) -> str:
    if not torch.cuda.is_available():
        return "gloo"
    return requested or "nccl"


def single_process_defaults(environment: os._Environ[str] | dict[str, str]) -> None:
    """A process that no launcher started is rank 0 of 1, at a port that nobody else has."""
    if "RANK" not in environment:
        environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    environment.setdefault("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", environment["WORLD_SIZE"]))


def decline_compiled_collectives() -> None:
    """DeepSpeed would compile a shared-memory all-reduce for CPUs at its first start (45 s, and a compiler); gloo is there already."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
