"""Which of the started processes run the model: the stages of a pipeline together, else the first one alone."""

from __future__ import annotations

import os

from megatron.config.launcher import LauncherConfig
from megatron.config.parallel import ParallelConfig


def take_part(parallel: ParallelConfig, launcher: LauncherConfig) -> bool:
    """Joins the other processes if they are the stages of one pipeline. False: this process has nothing to do.

    However many processes the configuration starts for training in another layout, one of them has the whole model and does the work.
    """
    layout, started = parallel.layout, int(os.environ.get("WORLD_SIZE", "1"))
    if not 1 < started == layout.pipe == layout.model:
        return int(os.environ.get("RANK", "0")) == 0
    from megatron.training.process import start_process

    start_process(backend=parallel.distributed_backend, threads=launcher.threads_per_process, layout=layout)
    return True
