"""The values that go through the layers: hidden states, losses and counts. Layers return them and keep nothing.

Shapes: B batch; S sequence; D model width; A auxiliary losses, in the order of the config; X MoE layers so far; E experts of the layer that has most;
G LoREs, likewise; I statistics; C counts of scores; T = B*S tokens; P width of a router's memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron.model.attention import LayerCache
from megatron.model.moe.routing import Decision
from megatron.model.moe.surroundings import Documents, Surroundings


class RouterReport(NamedTuple):
    """The report of the MoE layers, one row for each layer."""

    aux_losses_XA: Tensor
    """float32, unweighted, with gradient."""
    expert_load_XE: Tensor
    """int64: tokens sent to each expert; 0 beyond a layer's own experts."""
    lore_load_XG: Tensor
    """int64: tokens sent to each LoRE; G = 0 where there are none."""
    statistics_XI: Tensor
    """float32, detached, in the order of `megatron.model.moe.layer.STATISTICS`."""

    def then(self, aux_losses_A: Tensor, expert_load_E: Tensor, lore_load_G: Tensor, statistics_I: Tensor) -> RouterReport:
        """With one more layer."""
        rows = (aux_losses_A, expert_load_E, lore_load_G, statistics_I)
        return RouterReport(*(torch.cat([old, pad(new, (0, old.shape[1] - len(new)))[None]]) for old, new in zip(self, rows, strict=True)))


class LayerState(NamedTuple):
    """Input and output of every layer."""

    hidden_BSD: Tensor
    report: RouterReport
    earlier_load_XE: Tensor | None = None
    """int64: `expert_load_XE` of the step's earlier micro-batches, over all processes. None in the first micro-batch and outside training."""
    usage_2E: Tensor | None = None
    """How often a token uses each expert, and each expert's mean probability (with gradient), summed over the MoE layers so far. None before the
    first MoE layer, and if no loss needs all layers together."""
    scores_XC: Tensor | None = None
    """int64: `Routing.scores_C` of the MoE layers so far, for routers that balance themselves by quantiles. None: there are none."""
    memory_TP: Tensor | None = None
    """What the router of the last MoE layer remembers of each token, with gradient (`Surroundings.memory_TP`). None: no router remembers."""
    documents: Documents | None = None
    """None: no router asks for them."""
    decisions: tuple[Decision, ...] | None = None
    """What the routers of the MoE layers so far decided. None: nobody asked for it."""

    @staticmethod
    def start(hidden_BSD: Tensor, *, widths: tuple[int, int, int, int], rows: int = 0, earlier_load_XE: Tensor | None = None) -> LayerState:
        """The state before the first layer, or after `rows` MoE layers that saw no token. `widths` are (A, E, G, I)."""
        dtypes = (torch.float32, torch.int64, torch.int64, torch.float32)
        empty = (torch.zeros(rows, width, dtype=dtype, device=hidden_BSD.device) for width, dtype in zip(widths, dtypes, strict=True))
        return LayerState(hidden_BSD, RouterReport(*empty), earlier_load_XE)

    def around(self, cache: LayerCache | None) -> Surroundings:
        """What the router of the next MoE layer may look at."""
        return Surroundings(self.report.expert_load_XE.shape[0], self.memory_TP, self.documents, cache)

    def scored(self, scores_C: Tensor | None) -> LayerState:
        """With the counts of one more layer, where its router counts scores."""
        if scores_C is None:
            return self
        if self.scores_XC is None:
            return self._replace(scores_XC=scores_C[None])
        width = self.scores_XC.shape[1] - len(scores_C)
        before, own = (pad(rows, (0, max(0, more))) for rows, more in ((self.scores_XC, -width), (scores_C[None], width)))
        return self._replace(scores_XC=torch.cat([before, own]))

    def earlier_rows_E(self, num_experts: int) -> Tensor | None:
        """The row of `earlier_load_XE` for the next MoE layer. None: there is no earlier load."""
        if self.earlier_load_XE is None:
            return None
        return self.earlier_load_XE[self.report.expert_load_XE.shape[0], :num_experts]
