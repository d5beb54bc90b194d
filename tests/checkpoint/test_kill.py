"""A run killed with SIGKILL while it saves, at random moments, again and again: there is always a whole checkpoint, and it is what was saved."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron.checkpoint import layout
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.manifest import damage
from megatron.checkpoint.reading import read_file
from megatron.checkpoint.weights import load_model_weights
from tests.checkpoint.kill_work import save_for_ever

KEPT = 2
LONGEST_SECONDS = 0.6


def victims_life(context: multiprocessing.context.ForkServerContext, directory: Path, first: int, seconds: float) -> None:
    """Starts a run that saves from step `first` on, and kills it after `seconds` of saving."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=save_for_ever, args=(str(directory), first, KEPT, sender))
    process.start()
    sender.close()
    try:
        assert started(receiver), f"the run did not start: exit code {process.exitcode}"
        time.sleep(seconds)
        assert process.is_alive(), f"the run ended by itself: exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def started(receiver: Connection) -> bool:
    try:
        return receiver.poll(90) and receiver.recv() == "ready"
    except EOFError:
        return False


def check(directory: Path) -> int:
    """Everything that carries a checkpoint's name is whole, and the one found holds its own step everywhere. Returns the step."""
    for step in layout.iterations_in(directory):
        assert damage(layout.path_of(directory, step)) == []
    path = find_checkpoint(directory)
    weights = load_model_weights(path)
    step = weights.client_state["iteration"]
    assert path == layout.path_of(directory, step)
    assert weights.client_state["structmoe"] == {"step": step}
    assert (path / "configs" / "a.yml").read_text() == str(step)
    assert all((tensor == step).all() for tensor in weights.state_dict.values())
    optimizer = read_file(path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", mmap=True)["optimizer_state_dict"]
    assert all((tensor == step).all() for tensor in optimizer["single_partition_of_fp32_groups"])
    assert all((state[name] == step).all() for state in optimizer["base_optimizer_state"]["state"].values() for name in ("exp_avg", "exp_avg_sq"))
    return step


def kill_again_and_again(directory: Path, times: int) -> None:
    context = multiprocessing.get_context("forkserver")
    generator, step, moments = random.Random(0), 0, []
    while not (directory / layout.LATEST).exists():  # the first save is given the time to finish
        victims_life(context, directory, 1, LONGEST_SECONDS)
    for _ in range(times):
        moments.append(generator.uniform(0, LONGEST_SECONDS))
        victims_life(context, directory, step + 1, moments[-1])
        newest = check(directory)
        assert newest >= step, moments
        step = newest
    assert step > times // 4, f"hardly anything was saved between the kills at {moments}"


def test_killed_while_saving(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_while_saving_often(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 60)
