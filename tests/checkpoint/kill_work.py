"""A run that does nothing but save, for killing. A fork server has imported DeepSpeed already, so that each victim starts at once."""

from __future__ import annotations

import os
import tempfile
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.retention import prune
from tests.checkpoint.toy import quick_deepspeed

WIDTH = 400
DEPTH = 6


def fill(engine: Any, step: int) -> None:
    """Gives every weight and optimizer state the value of the step: what a checkpoint holds can be told from its number."""
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.fill_(step)
        for state in engine.optimizer.optimizer.state.values():
            state["exp_avg"].fill_(step)
            state["exp_avg_sq"].fill_(step)
        for flat in engine.optimizer.single_partition_of_fp32_groups:
            flat.fill_(step)


def save_for_ever(directory: str, first: int, keep_last_n: int, ready: Connection) -> None:
    """Saves steps first, first + 1, ... with retention, until it is killed. Every fourth step is saved twice."""
    from megatron.checkpoint.save import save_checkpoint

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    deepspeed = quick_deepspeed()
    rendezvous = tempfile.NamedTemporaryFile(prefix="rendezvous-")  # noqa: SIM115 -- lives as long as the process
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous.name}", rank=0, world_size=1)
    model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), fused=True), config=config, dist_init_required=False
    )
    engine.backward(engine(torch.ones(1, WIDTH)).sum())
    engine.step()
    ready.send("ready")
    for step in count(first):
        fill(engine, step)
        for _ in range(2 if step % 4 == 0 else 1):
            save_checkpoint(engine, Path(directory), step, client_state={"structmoe": {"step": step}}, documents={"a.yml": str(step)})
            prune(directory, keep_last_n)
