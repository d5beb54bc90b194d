"""The number format in which a CPU computes a model fastest.

Some CPUs multiply bfloat16 matrices several times faster than float32 ones, others several times slower. Choices of experts differ little: float32
rounds less.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from megatron.config.memory import machine_memory

SIZE = 512
GAIN = 1.5
"""The change must bring at least so much."""
ROOM = 0.6
"""Of the free memory, which the weights may take."""


def to_fast_format(model: nn.Module) -> bool:
    """Makes the weights float32 if they are in a shorter format, lie on a CPU that is slower with it, and fit the memory. Whether it did."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    room = machine_memory()
    size = sum(part.numel() for part in model.parameters()) * 4
    if (room is not None and size > ROOM * room.free) or seconds_of_product(weight.dtype) < GAIN * seconds_of_product(torch.float32):
        return False
    model.float()
    return True


def seconds_of_product(dtype: torch.dtype) -> float:
    """Of two matrices: the fastest of three tries, after one that does not count."""
    left, right = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(4):
        begun = time.process_time()
        left @ right
        times.append(time.process_time() - begun)
    return min(times[1:])
