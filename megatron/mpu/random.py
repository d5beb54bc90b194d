"""Random numbers of processes that share a layer: the same on all of them outside the parts that they share, different inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron.mpu.groups import Group
from megatron.mpu.regions import WHOLE, Region


@contextmanager
def own_stream(group: Group, *, needed: bool = True) -> Iterator[None]:
    """Inside, this process draws numbers of its own from PyTorch's generators; outside, all processes of the group stay in step.

    The streams start from one number that all of them draw, so a recomputation and a resumed run draw the same again. `needed` False: nothing is
    drawn inside, and nothing changes.
    """
    if group.size == 1 or not needed:
        yield
        return
    seed = int(torch.randint(2**62, (1,)))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + group.rank)
        yield


class SharedDropout(nn.Dropout):
    """Dropout between the parts that processes share. It differs between processes that hold different parts of the sequence."""

    region: Region = WHOLE

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        with own_stream(self.region.group, needed=self.region.sequence and self.training and self.p > 0):
            return super().forward(x)
