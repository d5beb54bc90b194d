"""Notices that a run of several processes has stopped, because one of them died or never entered a collective operation, and ends it with a report.

place.py     where one process is: its step, the operation it is in, whether it moved
verdict.py   from all places: does the run hang, and what the report says
wire.py      lines of JSON between the processes' watchers
watcher.py   the thread of each process
"""

from megatron.training.watch.watcher import HANG_STATUS, PeerFailed, Watcher, watched

__all__ = ["HANG_STATUS", "PeerFailed", "Watcher", "watched"]
