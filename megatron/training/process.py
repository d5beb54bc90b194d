"""Starts and ends this process as one of the group: device, threads, process group."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from megatron.config.machine import usable_cores
from megatron.kernels.heap import trim_heap, use_heap
from megatron.mpu.environment import LaunchError, complete_environment
from megatron.mpu.groups import make_groups
from megatron.mpu.topology import ONE, Layout, Topology, current_topology

# From glibc's malloc.h: blocks from this size on are mapped one by one; free memory at the top of the heap is given back from this size on; the heap
# grows by this much more than is needed.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD = -3, -1, -2
KEPT_BYTES = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 1 << 26}
TOLD = "__dynamo_disable"
"""The attribute of a function where PyTorch keeps what it calls in its place."""


def start_process(*, backend: str | None, threads: int | None, layout: Layout = ONE) -> Topology:
    """Joins the other processes (or makes a group of one) through DeepSpeed and returns the topology.

    `backend` None: nccl where there is a GPU, else gloo; nccl without a GPU becomes gloo.
    `threads` None: OMP_NUM_THREADS (deepy.py sets it), else this machine's cores divided by its processes.
    Raises LaunchError if the environment does not say the rank of this process, TopologyError if `layout` does not fit the number of processes,
    KernelUnavailable for an instruction set or a heap that is not known.
    """
    choose_accelerator()
    keep_freed_memory()
    if os.environ["DS_ACCELERATOR"] == "cpu":
        use_heap()
    leave_out_compiler()
    complete_environment(os.environ)
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, usable_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    if os.environ["DS_ACCELERATOR"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())  # a task may see its own GPU only
    import deepspeed

    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)  # DeepSpeed's calls, not the user's
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("LOGLEVEL", "WARNING").upper())
    decline_compiled_collectives()
    import_muon_without_compiling()
    if not torch.distributed.is_initialized():
        try:
            deepspeed.init_distributed(dist_backend=choose_backend(backend), auto_mpi_discovery=False, verbose=False)
        except torch.distributed.DistNetworkError as error:
            raise no_meeting(error) from None
        atexit.register(end_process)
    topology = current_topology(layout)
    make_groups(topology)
    return topology


def no_meeting(error: Exception) -> LaunchError:
    """A sentence for what torch says when the processes cannot meet."""
    place = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(error):
        return LaunchError(f"The processes cannot meet at {place}: another program uses this port. Set master_port to another one")
    return LaunchError(
        f"The processes cannot meet at {place}: {str(error).splitlines()[0]} Is process 0 started there, and can this machine reach it? "
        "The keys master_addr and master_port say where to meet"
    )


def choose_accelerator() -> None:
    """Tells DeepSpeed which device to run on, before its first import. Without this it searches for a device and warns."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks for the next step. Otherwise the system takes them back and must clear them again.

    This saves a sixth of the step time of a small model on a CPU. Does nothing if the C library is not glibc.
    """
    for setting, value in KEPT_BYTES.items():
        _glibc("mallopt", setting, value)


def return_freed_memory() -> None:
    """Returns to the system what is free inside the heaps. For the moment after something was built that stays: holes in between fit no later block.

    Of the two heaps, malloc's is left as it is if the C library is not glibc.
    """
    _glibc("malloc_trim", 0)
    trim_heap()


def _glibc(name: str, *numbers: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*numbers)


def leave_out_compiler() -> None:
    """Keeps PyTorch from loading its compiler only to tell it not to compile the methods of optimizers: 80 MiB and a second in every process.

    PyTorch 2.13 does so at the first call of each (`torch/_compile.py`). Where something else has loaded the compiler, it is told all the same.
    """
    optimizer = torch.optim.Optimizer
    for method in (optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict):
        function = getattr(method, "__wrapped__", None)
        if function is not None and not hasattr(function, TOLD):
            setattr(function, TOLD, told_later(function))


def told_later(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `function`; as the compiler wants it called, as soon as that is loaded."""

    def call(*args: Any, **kwargs: Any) -> Any:
        compiler = sys.modules.get("torch._dynamo")
        if compiler is None:
            return function(*args, **kwargs)
        setattr(function, TOLD, compiler.disable(function, wrapping=False))
        return getattr(function, TOLD)(*args, **kwargs)

    return call


def end_process() -> None:
    """Leaves the process group, so that the interpreter can end without a warning."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def choose_backend(requested: str | None) -> str:
    """The backend to use: the one that was asked for, but nccl only on GPUs."""
    return (requested or "nccl") if os.environ["DS_ACCELERATOR"] == "cuda" else "gloo"


def decline_compiled_collectives() -> None:
    """Stops DeepSpeed from compiling a shared-memory all-reduce for CPUs at its first start. That takes 45 s and a compiler, and gloo can do the
    work."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def import_muon_without_compiling() -> None:
    """Imports DeepSpeed's Muon without torch's compiler. No run here uses Muon, but ZeRO imports it, and then loading the compiler takes 2 s."""
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_function
