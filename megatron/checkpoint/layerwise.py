"""A checkpoint's weights one layer at a time, for who goes through all of them without room for all of them.

The files are opened again for every layer: what one layer's tensors have brought into memory goes when they go, and not with the last layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.held import WEIGHT
from megatron.checkpoint.names import modern_names, one_name
from megatron.checkpoint.shards import merge_shards
from megatron.checkpoint.stored import StoredCheckpoint, check_known_layout, client_state_of, inspect_checkpoint
from megatron.checkpoint.table import read_table
from megatron.checkpoint.weights import Expected, in_todays_order, load_model_weights, notices_on

LAYER = re.compile(r"sequential\.(\d+)\.")


class LayerwiseWeights:
    """The weights of the checkpoint at `path` under today's names, whole and in today's order. Raises CheckpointError, here and in `read`.

    Parts of several tensor- or pipeline-parallel processes are put together layer by layer; those of ZeRO 3 at once, in memory.
    """

    def __init__(self, path: Path, expected: Expected) -> None:
        table = read_table(path)
        self._joined: Any = None
        """A LogicalCheckpoint, where this program divided the weights among processes; else None."""
        if table is not None and table.is_divided:
            self._open_divided(path, expected)
            return
        stored = inspect_checkpoint(path)
        check_known_layout(stored)
        self.path, self.client_state = path, stored.client_state
        self._layer: str | None = None
        self._weights: dict[str, Tensor] = {}
        if stored.is_zero3:
            loaded = load_model_weights(path, expected)
            self._whole: dict[str, Tensor] | None = loaded.state_dict
            self.layout = loaded.gqa_layout
            self.names, self.notices, self._expected = list(loaded.state_dict), list(loaded.notices), expected
            return
        named = [modern_names(shard) for shard in stored.shards]
        ordered = in_todays_order(stored, named, expected)
        self._whole, self._expected = None, replace(expected, gqa_layout=ordered.layout)
        self.layout = ordered.layout
        self.names = list(named[0].state)
        self.notices = [f"{path}: {notice}" for notice in notices_on(stored, named, ordered)]

    def read(self, name: str) -> Tensor:
        """A weight. It is read from the file when it is used, and valid until one of another layer is asked for."""
        if self._joined is not None:
            weight: Tensor = self._joined.read(one_name(name), WEIGHT, self._joined.whole(one_name(name)))
            return weight
        if self._whole is not None:
            return self._whole[name]
        layer = layer_of(name)
        if layer != self._layer:
            self._weights = {}
            self._weights, self._layer = self._read_layer(inspect_checkpoint(self.path), layer), layer
        if name not in self._weights:
            raise CheckpointError(f"{self.path} holds no {name}.")
        return self._weights[name]

    def _open_divided(self, path: Path, expected: Expected) -> None:
        from megatron.checkpoint.logical import LogicalCheckpoint  # which reads other checkpoints through this class

        self._joined = LogicalCheckpoint(path, expected, optimizer=False)
        self.path, self.client_state, self.layout = path, client_state_of(path, self._joined.head), "q,k,v"
        self.names, self.notices = self._joined.every_name(), list[str]()

    def close(self) -> None:
        """Gives back the memory of the layer that was read last."""
        if self._joined is not None:
            self._joined.close()
        self._layer, self._weights = None, {}

    def _read_layer(self, stored: StoredCheckpoint, layer: str) -> dict[str, Tensor]:
        named = [modern_names({name: shard[name] for name in of_layer(shard, layer)}) for shard in stored.shards]
        ordered = in_todays_order(stored, named, self._expected)
        return merge_shards(ordered.shards, parallel_residual=self._expected.parallel_residual).state


def layer_of(name: str) -> str:
    """The number of the layer that a weight belongs to, under any prefix; empty for none."""
    match = LAYER.search(name)
    return match[1] if match else ""


def of_layer(names: Iterable[Any], layer: str) -> list[str]:
    """The names that belong to a layer."""
    return [name for name in names if layer_of(name) == layer]
