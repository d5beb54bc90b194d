"""Which architecture a model is written as."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.convert.architecture import Architecture, Source
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.errors import ConversionError
from megatron.convert.mapping import Misfit, Read, Zero

AUTO = "auto"
MAX_LISTED = 4


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
            raise ConversionError(f"No architecture of Hugging Face can represent this model. What {last.class_name} cannot represent:\n  {lacks}")
        return chosen
    if requested not in ARCHITECTURES:
        raise ConversionError(f"--architecture {requested}: must be {AUTO} or one of {', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[requested]
    if found := list(obstacles(architecture, source, read)):
        listed = "\n  ".join(found)
        raise ConversionError(
            f"{architecture.class_name} cannot represent this model:\n  {listed}\nRemove --architecture, and an architecture that can "
            "represent it is chosen."
        )
    return architecture


def left_origin(origin: str | None, chosen: Architecture, source: Source, read: Read) -> str | None:
    """Why an imported model is not written as the class it was imported as: a sentence, and a line for each key or weight. None: it is that class."""
    if origin not in ARCHITECTURES or origin == chosen.name:
        return None
    before = ARCHITECTURES[origin]
    found = list(obstacles(before, source, read))
    if not found:
        return None
    more = [f"and {len(found) - MAX_LISTED} more"] if len(found) > MAX_LISTED else []
    reasons = "\n  ".join(found[:MAX_LISTED] + more)
    changed = f"This model was imported as {before.class_name} and is exported as {chosen.class_name}"
    return f"{changed}, because {before.class_name} cannot represent:\n  {reasons}"


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
