"""int8 weights: each row is divided by a scale of its own and rounded, symmetric around 0."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.decode.interface import Matrix

LARGEST = 127


def quantize_rows(weight: Tensor) -> Matrix:
    """The matrix [rows, columns] in int8. A row's largest number becomes 127 or -127. A row of zeros has the scale 0."""
    wide = weight.float()
    scale = wide.abs().amax(1) / LARGEST
    whole = torch.round(wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).clamp(-LARGEST, LARGEST)
    return Matrix(whole.to(torch.int8).contiguous(), scale.contiguous())
