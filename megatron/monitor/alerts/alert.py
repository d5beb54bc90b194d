"""What an alert says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

ADVICE = {
    "loss_spike": "If the loss does not come back, start again from the checkpoint before this step with a lower lr, a smaller gradient_clipping or "
    "a longer warmup. Look at the texts of this step too: broken documents also cause spikes.",
    "nan_streak": "The weights do not change in such steps. If it goes on, start again from the last good checkpoint with a lower lr or a smaller "
    "gradient_clipping, or use bf16 in place of fp16.",
    "dead_experts": "Raise the coefficient of load_balance in moe_losses, or lower lr. An expert without tokens does not learn, so it seldom comes "
    "back by itself.",
    "dead_lores": "Add lore_balance to moe_losses or raise its coefficient, or use fewer LoREs (moe_num_lores).",
    "router_collapse": "Raise the coefficients of z_loss and load_balance in moe_losses, or lower lr. Start again from a checkpoint before this "
    "step, because a collapsed router hardly learns.",
    "process_overload": "All other processes wait for this one. Raise the coefficient of load_balance in moe_losses, or use fewer expert-parallel "
    "processes (moe_expert_parallel_size).",
}
"""Kind -> what to try."""
NAMES = {
    "loss_spike": "loss spike",
    "nan_streak": "NaN",
    "dead_experts": "dead experts",
    "dead_lores": "dead LoREs",
    "router_collapse": "router collapse",
    "process_overload": "overloaded process",
}
"""Kind -> what people read."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A rule's finding. `value` went over, or under, `limit`."""

    kind: str
    """A key of ADVICE."""
    step: int
    value: float
    limit: float
    seen: str
    """One sentence: what was seen, with the numbers."""
    layer: int | None = None
    """Number of the layer, counted from 0 over the layers that have experts. None: the alert is about the whole model."""

    @property
    def advice(self) -> str:
        """What to try."""
        return ADVICE[self.kind]

    @property
    def place(self) -> str:
        """` in MoE layer 3`; empty for the whole model."""
        return "" if self.layer is None else f" in MoE layer {self.layer}"

    @property
    def sentence(self) -> str:
        """What was seen and what to try, for a person."""
        return f"ALERT at step {self.step}: {NAMES[self.kind]}{self.place}. {self.seen} What to try: {self.advice}"

    def record(self) -> dict[str, Any]:
        """As metrics.jsonl holds it. JSON knows neither NaN nor infinity: null stands for both."""
        numbers = {name: value if math.isfinite(value) else None for name, value in (("value", self.value), ("limit", self.limit))}
        return {"kind": self.kind, "step": self.step, "layer": self.layer, **numbers, "seen": self.seen, "try": self.advice}
