"""Makes queries, keys and values from the fused projection: it is cut, normalised and rotated as the model needs. There is one class for each way.

Shapes: B batch; S sequence; H query heads; K key/value heads; d head dimension; W = (H + 2K)*d, the fused width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.kernels.attention.interface import HeadLayout
from megatron.kernels.attention.reference import turned
from megatron.model.positions import Places
from megatron.model.positions.rotary import rotary_table, split_rotated
from megatron.mpu.groups import Group
from megatron.mpu.regions import gather

Split = Callable[[Tensor, Places], tuple[Tensor, Tensor, Tensor]]
"""(fused_BSW, places) -> query BSHd, key BSKd, value BSKd."""


Norm = Callable[[Tensor], Tensor]
"""A function of queries BSHd or keys BSKd that keeps the shape."""


class PlainSplit:
    """Cut only."""

    def __init__(self, layout: HeadLayout) -> None:
        self.layout = layout

    def __call__(self, fused_BSW: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        return self.layout.views(widened(fused_BSW))


class Rotary:
    """The model's rotary positions: how many there are, and the frequency of each pair of dimensions that they turn."""

    def __init__(self, positions: int, frequencies: tuple[float, ...]) -> None:
        self.positions, self.frequencies = positions, frequencies

    def rows(self, places: Places, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens, float32."""
        cos_Pn, sin_Pn = rotary_table(self.positions, self.frequencies, device)
        return places.rows(cos_Pn, length), places.rows(sin_Pn, length)


class RotarySplit:
    """Cut and turned in one pass."""

    def __init__(self, layout: HeadLayout, rotary: Rotary) -> None:
        self.layout, self.rotary = layout, rotary

    def __call__(self, fused_BSW: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        return split_rotated(widened(fused_BSW), self.layout, *self.rotary.rows(places, fused_BSW.shape[1], fused_BSW.device))


class NormedSplit:
    """Cut, and queries and keys normalised."""

    def __init__(self, layout: HeadLayout, query_norm: Norm, key_norm: Norm) -> None:
        self.layout, self.query_norm, self.key_norm = layout, query_norm, key_norm

    def __call__(self, fused_BSW: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        query_BSHd, key_BSKd, value_BSKd = self.heads(fused_BSW)
        return widened(self.query_norm(query_BSHd)), widened(self.key_norm(key_BSKd)), widened(value_BSKd)

    def heads(self, fused_BSW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads that are normalised."""
        return self.layout.views(fused_BSW)


class NormedRotarySplit(NormedSplit):
    """Cut, normalised and then turned."""

    def __init__(self, layout: HeadLayout, query_norm: Norm, key_norm: Norm, rotary: Rotary) -> None:
        super().__init__(layout, query_norm, key_norm)
        self.rotary = rotary

    def __call__(self, fused_BSW: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        query_BSHd, key_BSKd, value_BSKd = super().__call__(fused_BSW, places)
        angles = self.rotary.rows(places, fused_BSW.shape[1], fused_BSW.device)
        return turned(query_BSHd, *angles), turned(key_BSKd, *angles), value_BSKd


class RepeatedSplit(NormedSplit):
    """One norm with weights for every query head. Each key/value head is repeated for the query heads that share it, and normalised for each (K =
    H)."""

    def heads(self, fused_BSW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_BSHd, key_BSKd, value_BSKd = self.layout.views(fused_BSW)
        times = self.layout.heads // self.layout.kv_heads
        return query_BSHd, key_BSKd.repeat_interleave(times, 2), value_BSKd.repeat_interleave(times, 2)


class RepeatedRotarySplit(RepeatedSplit, NormedRotarySplit):
    """As RepeatedSplit, then rotated."""


def over_all_heads(norm: nn.Module) -> Norm:
    """The norm of all heads' dimensions together, [..., H*d], for heads that are apart, [..., H, d]."""
    return lambda x: norm(x.flatten(-2)).view_as(x)


def shared_norm(norm: Norm, group: Group, heads: int) -> Norm:
    """A norm over all `heads` heads of the model, for BSHd of which each process has some. Where there are fewer heads than processes, neighbours
    have the same one."""

    def normed(x_BSHd: Tensor) -> Tensor:
        own = x_BSHd.shape[2]
        copies = max(1, own * group.size // heads)
        whole_BSHd = gather(x_BSHd, group, 2, summed=True)[:, :, ::copies]
        first = group.rank * own // copies
        return norm(whole_BSHd)[:, :, first : first + own]

    return normed


def widened(x: Tensor) -> Tensor:
    """Casts to float32 if a CPU would attend in 16 bits. There the backward of PyTorch's SDPA is five times slower in 16 bits, even without the
    casts."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x
