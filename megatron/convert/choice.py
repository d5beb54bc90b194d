"""Which architecture a model is written as."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.convert.architecture import Architecture, Source
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import Misfit, Read, Zero

AUTO = "auto"


def choose_architecture(source: Source, requested: str, read: Read, origin: str | None = None) -> Architecture:
    """The one asked for, or the first that holds the model; `origin` is tried before all others, where an import has one.

    Raises ConversionError with everything that the one asked for cannot represent, key by key.
    """
    if requested == AUTO:
        ordered = sorted(ARCHITECTURES.values(), key=lambda architecture: architecture.name != origin)
        chosen = next((architecture for architecture in ordered if not any(obstacles(architecture, source, read))), None)
        if chosen is None:
            last = list(ARCHITECTURES.values())[-1]
            lacks = "\n  ".join(obstacles(last, source, read))
            raise ConversionError(f"No architecture of Hugging Face's holds this model. What {last.class_name} lacks:\n  {lacks}")
        return chosen
    if requested not in ARCHITECTURES:
        raise ConversionError(f"--architecture {requested}: must be {AUTO} or one of {', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[requested]
    if found := list(obstacles(architecture, source, read)):
        listed = "\n  ".join(found)
        raise ConversionError(f"{architecture.class_name} cannot represent this model:\n  {listed}\nLeave --architecture out to take one that can.")
    return architecture


def obstacles(architecture: Architecture, source: Source, read: Read) -> Iterator[str]:
    """What it cannot represent: keys first; where all of them fit, weights that it does not have and that are not zero."""
    fits = True
    for sentence in architecture.obstacles(source):
        fits = False
        yield sentence
    for entry in architecture.table(source) if fits else ():
        if isinstance(entry.form, Zero) and entry.ours is not None:
            try:
                entry.form.there(read(entry.ours))
            except Misfit as error:
                yield f"{entry.ours} {error}"
