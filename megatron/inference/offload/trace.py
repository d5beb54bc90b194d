"""Which experts (and LoREs) each token used: what the simulator replays, what static takes its profile from, and what belady knows.

A step is one call of the model: one token, or the tokens of a prompt. A trace of ours is an .npz file:
    format          1
    step_T          int64: the step of each token, ascending
    layer_L         int64: the numbers of the layers with experts
    expert_TLK      int32: the experts of each token; -1 where a token used fewer
    lore_TLKM       int32: the LoREs of each of them, within the expert; no entry without LoREs
    num_experts     int64; num_lores int64: of an expert, 0 without LoREs

Shapes: T tokens; L layers with experts; K experts per token; M LoREs per expert and token.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.config.disk import explained
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.policies import Steps

Numbers = npt.NDArray[np.int64]
FORMAT = 1
MOST_EXPERTS = 65_536
"""Of one layer. More would be a damaged file, and tables for them would fill the memory."""


class Trace(NamedTuple):
    """The routing of a text."""

    step_T: Numbers
    layers: Sequence[int]
    expert_TLK: Numbers
    num_experts: int
    lore_TLKM: Numbers | None = None
    """None: there are no LoREs."""
    num_lores: int = 0
    """Of one expert."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.step_T)

    def steps(self, layer: int, *, granularity: str = "expert") -> Steps:
        """The different units that each step used in a layer, ascending. Raises OffloadError for a layer or LoREs that it does not hold."""
        if layer not in self.layers or (granularity == "lore" and self.lore_TLKM is None):
            what = f"layer {layer}" if layer not in self.layers else "LoREs"
            raise OffloadError(f"The routing trace holds no {what}: record it with the same model.")
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
    """Writes the file. Raises OffloadError."""
    entries: dict[str, Any] = {
        "format": np.int64(FORMAT),
        "step_T": trace.step_T.astype(np.int64),
        "layer_L": np.array(trace.layers, np.int64),
        "expert_TLK": trace.expert_TLK.astype(np.int32),
        "num_experts": np.int64(trace.num_experts),
        "num_lores": np.int64(trace.num_lores),
    }
    if trace.lore_TLKM is not None:
        entries["lore_TLKM"] = trace.lore_TLKM.astype(np.int32)
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, **entries)
    except OSError as error:
        raise OffloadError(f"{path} cannot be written: {explained(error, path)}.") from error


def read_trace(path: Path) -> Trace:
    """A trace of ours. Raises OffloadError."""
    try:
        with np.load(path, allow_pickle=False) as content:
            held = {name: content[name] for name in content.files}
        return checked(_trace_in(path, held), path)
    except OffloadError:
        raise
    except OSError as error:
        raise OffloadError(f"{path} cannot be read: {explained(error, path)}.") from error
    except (EOFError, zipfile.BadZipFile, zlib.error):
        reason = "the file is damaged or was cut short"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):  # among them text, and what only pickle could read
        reason = "it does not hold the arrays of a trace"
    raise OffloadError(f"{path} is no routing trace: {reason}. Record it again with expert_offload.record.")


def _trace_in(path: Path, held: Mapping[str, Any]) -> Trace:
    missing = {"format", "step_T", "layer_L", "expert_TLK", "num_experts"} - set(held)
    if missing or int(held["format"]) != FORMAT or held["expert_TLK"].ndim != 3 or len(held["step_T"]) != len(held["expert_TLK"]):
        raise OffloadError(f"{path} is no routing trace of this version ({', '.join(sorted(missing)) or 'its arrays'} missing or of another form).")
    lores = held["lore_TLKM"].astype(np.int64) if "lore_TLKM" in held else None
    layers = [int(layer) for layer in held["layer_L"]]
    counts = int(held["num_experts"]), int(held.get("num_lores", 0))
    return Trace(held["step_T"].astype(np.int64), layers, held["expert_TLK"].astype(np.int64), counts[0], lores, counts[1])


def checked(trace: Trace, path: Path) -> Trace:
    """The trace itself. Raises OffloadError for one without tokens, or with numbers that no layer's experts can have."""
    if not trace.expert_TLK.size:
        raise OffloadError(f"{path} holds no token, so there is nothing to replay.")
    if trace.num_experts > MOST_EXPERTS:
        raise OffloadError(f"{path} names {trace.num_experts:,} experts of a layer: at most {MOST_EXPERTS:,} are possible. Record it again.")
    lowest, highest = int(trace.expert_TLK.min()), int(trace.expert_TLK.max())
    if highest < 0:
        raise OffloadError(f"{path} names no expert, so there is nothing to replay.")
    if lowest < -1 or highest >= trace.num_experts:
        wrong = highest if highest >= trace.num_experts else lowest
        raise OffloadError(f"{path} names expert {wrong}, and a layer has experts from 0 to {trace.num_experts - 1} (num_experts).")
    return trace
