"""Names of weights that earlier versions of GPT-NeoX wrote, as today's: what a checkpoint holds is brought into one form before it is looked at.

Until September 2024 the MLP's layers were `dense_h_to_4h` and `dense_4h_to_h`, those of a Llama `w1`, `w2` and `w3`: w2(act(w1 x) * w3 x), so that
w1 is the gate and w3 the up-projection, packed [up ; gate] in `linear1` since then. Buffers that follow from the configuration were saved with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError

WRAPPER = "module."
STAGE_NAME, TIED_NAME = re.compile(r"\d+\."), re.compile(r"tied_modules\.[^.]+\.")
"""How DeepSpeed's pipeline names a layer by its number, and the embedding, which the last stage shares."""
RENAMED = {".mlp.dense_h_to_4h.": ".mlp.linear1.", ".mlp.dense_4h_to_h.": ".mlp.linear2.", ".mlp.w2.": ".mlp.linear2."}
SHARED_TABLE = re.compile(r"^sequential\.\d+\.attention\.rpe\.weight$")
UP, GATE, PACKED = ".mlp.w3.", ".mlp.w1.", ".mlp.linear1."
BUFFER = re.compile(r"(?:\.rotary_emb\.(?:inv_freq|cos_cached|sin_cached)|\.alibi_embed\.slopes|\.position_embeddings\.inv_freq|\.masked_bias)$")


def is_derived(name: str) -> bool:
    """Whether a checkpoint's entry is no weight but a buffer that follows from the configuration."""
    return BUFFER.search(name) is not None


def logical_name(name: str) -> str:
    """`2.norm.scale` and `module.sequential.2.norm.scale` -> `sequential.2.norm.scale`, `tied_modules.embed.x` -> `sequential.0.x`."""
    while name.startswith(WRAPPER):
        name = name.removeprefix(WRAPPER)
    if match := TIED_NAME.match(name):
        return f"sequential.0.{name[match.end() :]}"
    return f"sequential.{name}" if STAGE_NAME.match(name) else name


def one_name(name: str) -> str:
    """The table of relative positions is one weight that every layer has under its own name: the first layer's stands for all of them."""
    return SHARED_TABLE.sub("sequential.2.attention.rpe.weight", name)


class Named(NamedTuple):
    """Weights by today's names, and what was translated (`old -> new`) or left out, each kind once."""

    state: dict[str, Tensor]
    translated: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def is_old(self) -> bool:
        """Whether it was written before September 2024."""
        return any(old.startswith("mlp.") for old in self.translated)


def modern_names(stored: Mapping[str, Tensor]) -> Named:
    """The weights of one process under today's names. Raises CheckpointError when two names claim one weight, or a gate lacks its pair."""
    state: dict[str, Tensor] = {}
    translated: dict[str, None] = {}
    left_out: dict[str, None] = {}
    for stored_name, tensor in stored.items():
        name = stored_name
        while name.startswith(WRAPPER):
            name = name.removeprefix(WRAPPER)
            translated["module. -> nothing"] = None
        if match := BUFFER.search(name):
            left_out[match.group().strip(".")] = None
            continue
        for old, new in RENAMED.items():
            if old in name:
                translated[f"{old.strip('.')} -> {new.strip('.')}"] = None
                name = name.replace(old, new)
        if name in state:
            raise CheckpointError(f"the checkpoint holds both {stored_name} and {name}, but only one of them can be the weight.")
        state[name] = tensor
    packed = _pack_gates(state)
    if packed is not state:
        translated["mlp.w3 and mlp.w1 -> mlp.linear1"] = None
    return Named(packed, tuple(translated), tuple(left_out))


def _pack_gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with [w3 ; w1] as linear1; `state` itself where there is nothing to pack."""
    if not any(GATE in name or UP in name for name in state):
        return state
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        partner = name.replace(GATE, UP) if GATE in name else name.replace(UP, GATE)
        if partner != name and partner not in state:
            raise CheckpointError(f"the checkpoint holds {name} but not {partner}; a gated MLP has both.")
        if UP in name:
            continue
        if GATE not in name:
            packed[name] = tensor
        elif (target := name.replace(GATE, PACKED)) in state:
            raise CheckpointError(f"the checkpoint holds both {name} and {target}, but only one of them can be the weight.")
        else:
            packed[target] = torch.cat([state[partner], tensor])
    return packed
