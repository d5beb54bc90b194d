"""The state of a run that a resumed run needs besides weights, optimizer and random states."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class TrainingState:
    """Counters of a run. `iteration` counts all steps, skipped ones included. `skipped` counts steps that changed nothing."""

    iteration: int = 0
    skipped: int = 0
    nonfinite: int = 0
    """Steps whose loss was NaN or infinite."""
    skipped_in_a_row: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    samples_at_once: int = 0
    """The samples that all processes together took for one forward pass when the run began. A pass through the data is a multiple of it, in this
    layout and in those that the run goes on in. 0: not known yet."""

    @property
    def steps_done(self) -> int:
        """The number of optimizer steps that changed the weights. The learning-rate schedule counts these."""
        return self.iteration - self.skipped

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, values: dict[str, Any]) -> TrainingState:
        """Unknown entries are ignored and missing ones are 0, so that old and new checkpoints can be read."""
        return cls(**{field.name: int(values[field.name]) for field in fields(cls) if field.name in values})
