"""Notices that a run of several processes has stopped, because one of them died or never entered a collective operation, and ends it with a report.

place.py     where one process is: its step, the operation it is in, whether it moved
verdict.py   from all places: does the run hang, and what the report says
wire.py      lines of JSON between the processes' watchers
watcher.py   the thread of each process
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from megatron.mpu.topology import Topology

if TYPE_CHECKING:
    from megatron.training.watch.watcher import Watcher


def watched(topology: Topology, limit_s: float, *, device_type: str) -> AbstractContextManager[Watcher | None]:
    """`watcher.watching`, where there is anyone to watch. A process that is alone (None) loads nothing of it, so that it starts no later."""
    if topology.world_size == 1:
        return nullcontext()
    from megatron.training.watch.watcher import watching

    return watching(topology, limit_s, device_type=device_type)
