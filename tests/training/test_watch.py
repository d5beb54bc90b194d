"""A run of several processes in which one dies, fails or never enters a collective operation ends soon, and says who it was."""

from __future__ import annotations

import time

import pytest

from tests.training.ranks import ended, started
from tests.training.runs import run_values

PLUGIN = ["tests.training.trouble"]


@pytest.mark.parametrize("kind", ["sleep", "compute", "stop", "raise", "kill"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_try(corpus, tmp_path, kind, rank):
    values = run_values(
        corpus, None, train_iters=50, eval_iters=0, plugins=PLUGIN, collective_timeout_s=3, zero_optimization={"stage": 1}, train_batch_size=6
    )
    t = time.time()
    with started(values, tmp_path, 3, TROUBLE=f"{kind}:{rank}:6") as ranks:
        for r, (status, error) in enumerate(ended(ranks, 60)):
            print("=======", r, status)
            print(error[-6000:])
    print(time.time() - t)
