"""Which experts (and LoREs) each token used, as one form that training, generation and analysis share, and as a file.

A step is one call of the model: one token, or the tokens of a prompt, or the tokens of a training step. A trace of ours is an .npz file:
    format          2 (files of format 1 hold no entry with a star)
    step_T          int64: the step of each token, ascending
    layer_L         int64: the numbers of the layers with experts
    expert_TLK      int32: the experts of each token, the one with the largest weight first; -1 where a token used fewer
    lore_TLKM       int32: the LoREs of each of them, within the expert; -1 where there is none; no entry without LoREs
    num_experts     int64: of the layer with the most; num_lores int64: of an expert, 0 without LoREs
    experts_L*      int64: how many experts each layer has
    weight_TLK*     float32: what each expert's output is multiplied by
    token_T*        int64: the tokens themselves
    sequence_T*     int64: neighbours with the same number follow each other in one text
    domain_T*       int64: the text's kind, a place in `domains`;   names* uint8: JSON with `model`, `domains` and the text of the tokens

A starred entry may be missing: whoever wrote the trace did not know it.

Shapes: T tokens; L layers with experts; K experts per token; M LoREs per expert and token.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.config.disk import explained

Numbers = npt.NDArray[np.int64]
Choices = npt.NDArray[Any]
"""Integers of any width; -1 where there is none."""
FORMATS = (1, 2)
MOST_EXPERTS = 65_536
"""Of one layer. More would be a damaged file, and tables for them would fill the memory."""


class TraceError(ValueError):
    """A routing trace cannot be read, written or used. The message names the file or number, and says what to do."""


class Trace(NamedTuple):
    """The routing of a text."""

    step_T: Numbers
    layers: Sequence[int]
    expert_TLK: Choices
    num_experts: int
    """Of the layer with the most."""
    lore_TLKM: Choices | None = None
    """None: there are no LoREs."""
    num_lores: int = 0
    """Of one expert."""
    weight_TLK: npt.NDArray[np.float32] | None = None
    """None: the weights are not known."""
    token_T: Numbers | None = None
    """None: the tokens are not known."""
    sequence_T: Numbers | None = None
    """None: all tokens are of one sequence."""
    domain_T: Numbers | None = None
    """Places in `domains`. None: all tokens are of one domain."""
    domains: Sequence[str] = ()
    experts_L: Sequence[int] | None = None
    """None: each layer has `num_experts`."""
    pieces: Mapping[int, str] | None = None
    """The text of each token that occurs. None: it is not known."""
    model: str = ""
    """Which model wrote it, for people."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.step_T)

    @property
    def experts_by_layer(self) -> list[int]:
        """How many experts each layer has."""
        return [self.num_experts] * len(self.layers) if self.experts_L is None else list(self.experts_L)

    def steps(self, layer: int, *, granularity: str = "expert") -> list[list[int]]:
        """The different units that each step used in a layer, ascending. Raises TraceError for a layer or LoREs that it does not hold."""
        if layer not in self.layers or (granularity == "lore" and self.lore_TLKM is None):
            what = f"layer {layer}" if layer not in self.layers else "LoREs"
            raise TraceError(f"The routing trace holds no {what}: record it with the same model.")
        place = list(self.layers).index(layer)
        units_TN = self.expert_TLK[:, place]
        if granularity == "lore" and self.lore_TLKM is not None:
            lore_TKM = self.lore_TLKM[:, place]
            units_TN = np.where(lore_TKM < 0, -1, units_TN[..., None] * self.num_lores + lore_TKM).reshape(len(lore_TKM), -1)
        starts = np.flatnonzero(np.diff(self.step_T)) + 1
        return [[int(unit) for unit in np.unique(part) if unit >= 0] for part in np.split(units_TN, starts)]

    def blocks(self, layer: int) -> Sequence[Sequence[Sequence[int]]]:
        """For LoREs: of each step, for each of its experts the LoREs that its tokens used, which are needed together."""
        return [
            [[unit for unit in step if unit // self.num_lores == expert] for expert in sorted({unit // self.num_lores for unit in step})]
            for step in self.steps(layer, granularity="lore")
        ]


def write_trace(path: Path, trace: Trace) -> None:
    """Writes the file completely or not at all. Raises TraceError."""
    names = {"model": trace.model, "domains": list(trace.domains), "pieces": None if trace.pieces is None else dict(trace.pieces)}
    entries: dict[str, Any] = {
        "format": np.int64(FORMATS[-1]),
        "step_T": trace.step_T.astype(np.int64),
        "layer_L": np.array(trace.layers, np.int64),
        "expert_TLK": trace.expert_TLK.astype(np.int32),
        "num_experts": np.int64(trace.num_experts),
        "num_lores": np.int64(trace.num_lores),
        "experts_L": np.array(trace.experts_by_layer, np.int64),
        "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
    }
    if trace.lore_TLKM is not None:
        entries["lore_TLKM"] = trace.lore_TLKM.astype(np.int32)
    if trace.weight_TLK is not None:
        entries["weight_TLK"] = trace.weight_TLK.astype(np.float32)
    entries |= {name: values.astype(np.int64) for name in PER_TOKEN if (values := getattr(trace, name)) is not None}
    unfinished = path.with_name(f".{path.name}.new")
    try:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **entries)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise TraceError(f"{path} cannot be written: {explained(error, path)}.") from error


PER_TOKEN = ("token_T", "sequence_T", "domain_T")


def read_trace(path: Path) -> Trace:
    """A trace of ours. Raises TraceError."""
    try:
        with np.load(path, allow_pickle=False) as content:
            held = {name: content[name] for name in content.files}
        return checked(_trace_in(path, held), path)
    except TraceError:
        raise
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {explained(error, path)}.") from error
    except (EOFError, zipfile.BadZipFile, zlib.error):
        reason = "the file is damaged or was cut short"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):  # among them text, and what only pickle could read
        reason = "it does not hold the arrays of a trace"
    raise TraceError(f"{path} is no routing trace: {reason}. Record it again with expert_offload.record or routing_trace_steps.")


def _trace_in(path: Path, held: Mapping[str, Any]) -> Trace:
    missing = {"format", "step_T", "layer_L", "expert_TLK", "num_experts"} - set(held)
    if missing or int(held["format"]) not in FORMATS or not _fits(held):
        raise TraceError(f"{path} is no routing trace of this version ({', '.join(sorted(missing)) or 'its arrays'} missing or of another form).")
    names = json.loads(held["names"].tobytes()) if "names" in held else {}
    pieces = names.get("pieces")
    return Trace(
        held["step_T"].astype(np.int64),
        [int(layer) for layer in held["layer_L"]],
        held["expert_TLK"].astype(np.int64),
        int(held["num_experts"]),
        held["lore_TLKM"].astype(np.int64) if "lore_TLKM" in held else None,
        int(held.get("num_lores", 0)),
        held.get("weight_TLK"),
        **{name: held[name].astype(np.int64) for name in PER_TOKEN if name in held},
        domains=tuple(names.get("domains", ())),
        experts_L=[int(count) for count in held["experts_L"]] if "experts_L" in held else None,
        pieces=None if pieces is None else {int(token): str(text) for token, text in pieces.items()},
        model=str(names.get("model", "")),
    )


def _fits(held: Mapping[str, Any]) -> bool:
    """Whether the arrays have the shapes that belong together."""
    choices = held["expert_TLK"].shape
    if len(choices) != 3:
        return False
    expected = {"step_T": choices[:1], "layer_L": choices[1:2], "experts_L": choices[1:2], "weight_TLK": choices} | dict.fromkeys(
        PER_TOKEN, choices[:1]
    )
    fitting = all(held[name].shape == shape for name, shape in expected.items() if name in held)
    return fitting and ("lore_TLKM" not in held or (held["lore_TLKM"].ndim == 4 and held["lore_TLKM"].shape[:3] == choices))


def checked(trace: Trace, path: Path) -> Trace:
    """The trace itself. Raises TraceError for one without tokens, or with numbers that no layer's experts can have."""
    if not trace.expert_TLK.size:
        raise TraceError(f"{path} holds no token, so there is nothing to replay.")
    if max(trace.num_experts, trace.num_lores) > MOST_EXPERTS:
        many = max(trace.num_experts, trace.num_lores)
        raise TraceError(f"{path} names {many:,} experts of a layer: at most {MOST_EXPERTS:,} are possible. Record it again.")
    lowest, highest = int(trace.expert_TLK.min()), int(trace.expert_TLK.max())
    if highest < 0:
        raise TraceError(f"{path} names no expert, so there is nothing to replay.")
    if lowest < -1 or highest >= trace.num_experts:
        wrong = highest if highest >= trace.num_experts else lowest
        raise TraceError(f"{path} names expert {wrong}, and a layer has experts from 0 to {trace.num_experts - 1} (num_experts).")
    for place, (layer, count) in enumerate(zip(trace.layers, trace.experts_by_layer, strict=True)):
        if (wrong := int(trace.expert_TLK[:, place].max())) >= count:
            raise TraceError(f"{path} names expert {wrong} of layer {layer}, which has experts from 0 to {count - 1} (experts_L).")
    if trace.lore_TLKM is not None and trace.lore_TLKM.size and not -1 <= trace.lore_TLKM.min() <= trace.lore_TLKM.max() < trace.num_lores:
        raise TraceError(f"{path} names a LoRE outside of 0 to {trace.num_lores - 1} (num_lores). Record it again.")
    if trace.domain_T is not None and not 0 <= trace.domain_T.min() <= trace.domain_T.max() < len(trace.domains):
        raise TraceError(f"{path} names a domain outside of 0 to {len(trace.domains) - 1} (domains). Record it again.")
    return trace
