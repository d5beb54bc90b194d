"""Whether the weights that are about to be saved are numbers at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.checkpoint import ranks


def not_finite(module: nn.Module) -> str | None:
    """The name of a weight that holds NaN or infinity on any process; None when there is none. Collective; one pass over the weights, no copies."""
    names, extremes = [], []
    for name, parameter in module.named_parameters():
        held = held_part(parameter)
        if held.numel():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(held.detach())).float())
    finite = torch.isfinite(torch.stack(extremes)).all(1).tolist() if extremes else []
    bad = next((name for name, good in zip(names, finite, strict=True) if not good), None)
    return next((name for name in ranks.gather(bad) if name is not None), None)


def held_part(parameter: nn.Parameter) -> Tensor:
    """What this process has of a weight: all of it, or its share under ZeRO 3 without what pads the last share."""
    share: Tensor | None = getattr(parameter, "ds_tensor", None)
    if share is None:
        return parameter
    left: int = parameter.ds_numel - ranks.rank() * share.numel()  # type: ignore[attr-defined]
    return share.flatten()[: max(0, left)]
