"""ALiBi (Press et al., 2022): score += -slope * distance, with a slope of its own for each head."""

from __future__ import annotations

import math

from megatron.model.positions.derived import DerivedBuffer


class AlibiSlopes(DerivedBuffer):
    """The slopes of the heads, under GPT-NeoX's name. `own`: the heads that this process has; None: all of them."""

    def __init__(self, heads: int, own: range | None = None) -> None:
        slopes = alibi_slopes(heads)
        super().__init__("slopes", slopes if own is None else slopes[own.start : own.stop])


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... for a power of two n; for other numbers those of the power below, and then every second one of the power above."""
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    if power < heads:
        slopes += alibi_slopes(2 * power)[::2][: heads - power]
    return slopes
