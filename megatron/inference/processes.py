"""Which of the started processes run the model: the stages of a pipeline together, else the first one alone."""

from __future__ import annotations

import os

from megatron.config.launcher import LauncherConfig
from megatron.config.parallel import ONE, ParallelConfig


def take_part(parallel: ParallelConfig, launcher: LauncherConfig, *, replicas: bool = False) -> bool:
    """Joins the other processes if they are the stages of one pipeline, or with `replicas` if there are several. False: this process has nothing to
    do.

    However many processes the configuration starts for training in another layout, one of them has the whole model and does the work; with `replicas`
    each of them does, and they share the work.
    """
    layout, started = parallel.layout, int(os.environ.get("WORLD_SIZE", "1"))
    if not 1 < started == layout.pipe == layout.model:
        if started == 1 or not replicas:
            return int(os.environ.get("RANK", "0")) == 0
        layout = ONE
    from megatron.training.process import start_process

    start_process(backend=parallel.distributed_backend, threads=launcher.threads_per_process, layout=layout)
    return True
