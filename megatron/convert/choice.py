"""Which architecture a model is written as."""

from __future__ import annotations

from megatron.convert.architecture import Architecture, Source
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.errors import ConversionError

AUTO = "auto"


def choose_architecture(source: Source, requested: str = AUTO) -> Architecture:
    """The one asked for, or the first that holds the model. Raises ConversionError with everything that one cannot represent, key by key."""
    if requested == AUTO:
        fitting = (architecture for architecture in ARCHITECTURES.values() if not list(architecture.obstacles(source)))
        chosen = next(fitting, None)
        if chosen is None:
            raise ConversionError("No architecture of Hugging Face's holds this model; --architecture NAME says what one of them lacks.")
        return chosen
    if requested not in ARCHITECTURES:
        raise ConversionError(f"--architecture {requested}: must be {AUTO} or one of {', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[requested]
    if obstacles := list(architecture.obstacles(source)):
        listed = "\n  ".join(obstacles)
        raise ConversionError(f"{architecture.class_name} cannot represent this model:\n  {listed}\nLeave --architecture out to take one that can.")
    return architecture
