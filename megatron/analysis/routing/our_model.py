"""A checkpoint of ours, in whichever layout it lies on disk, as a RoutedModel."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megatron.analysis.routing.blocks import Pieces
from megatron.analysis.routing.number_format import to_fast_format
from megatron.analysis.routing.routed_model import Kind, RoutedModelError, name_of
from megatron.analysis.routing.tally import Origin
from megatron.checkpoint import layout
from megatron.checkpoint.find import find_checkpoint
from megatron.config import NeoXConfig, config_from_dict
from megatron.convert.opened import checkpoint_config
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.offload.units import moe_layers
from megatron.model.attention import build_cache
from megatron.model.moe.routing import Chosen
from megatron.monitor.trace_layers import Routed, choices_of, joined

ONE_PROCESS = {"model_parallel_size": 1, "pipe_parallel_size": 0, "moe_expert_parallel_size": 1, "sequence_parallel": False}
"""Settings of the run that do not concern a model in one process."""
TOKENIZER_FILES = ("vocab_file", "merge_file")
LEFT_OUT = ("kernel_backends", "expert_offload", "hostfile", "num_gpus", "num_nodes", "include", "exclude")


class OurModel:
    """See RoutedModel."""

    def __init__(self, ready: ReadyModel, source: str, config: NeoXConfig) -> None:
        """Raises RoutedModelError for a model without experts."""
        self._ready, self._layers = ready, moe_layers(ready.gpt)
        if not self._layers:
            raise RoutedModelError(f"{source} is a dense model: it has no experts (moe_num_experts), so there is no routing to look at.")
        experts = {layer: part.context.num_experts for layer, part in self._layers.items()}
        first = self._chosen(np.zeros((1, min(8, ready.context_length)), np.int64))
        lores = max(0 if layer.lore_TKL is None else layer.lore_TKL.shape[2] for layer in first)
        top_k = max(layer.expert_TK.shape[1] for layer in first)
        numbers = sorted(self._layers)
        self.kind = Kind(numbers, [experts[layer] for layer in numbers], top_k, config.moe.moe_num_lores if lores else 0, lores)
        self.origin = Origin(name_of(ready.path, ready.iteration), source, "checkpoint", ready.iteration)
        self.context, self.end = ready.context_length, ready.tokenizer.eod

    def encode(self, text: str) -> list[int]:
        """See RoutedModel."""
        return self._ready.tokenizer.encode(text)

    def pieces(self, tokens: Iterable[int]) -> Pieces:
        """See RoutedModel."""
        end = self.end
        return {token: "<end>" if token == end else self._ready.tokenizer.decode([token]) for token in tokens}

    def route(self, token_BS: npt.NDArray[np.int64]) -> Routed:
        """See RoutedModel."""
        return joined([choices_of(layer) for layer in self._chosen(token_BS)])

    @torch.inference_mode()
    def _chosen(self, token_BS: npt.NDArray[np.int64]) -> list[Chosen]:
        ready, (batch, length) = self._ready, token_BS.shape
        caches = build_cache(ready.sizes, batch, length, dtype=ready.dtype, device=str(ready.device))
        _, decisions = ready.gpt.traced_logits(torch.from_numpy(token_BS).to(ready.device), cache=caches)
        return [decision.chosen() for decision in decisions]


def open_checkpoint(path: Path, *, trusted: bool = False) -> OurModel:
    """`path`: a checkpoint (global_step100), or the directory of a run, of which `latest` names one. `trusted`: its plugins are imported.

    Raises RoutedModelError, CheckpointError, ConfigError, ConversionError and TokenizerError.
    """
    checkpoint = path if layout.looks_like_checkpoint(path) else find_checkpoint(path)
    step = layout.TAG_PATTERN.fullmatch(checkpoint.resolve().name)
    if step is None:
        raise RoutedModelError(f"{checkpoint}: a checkpoint's folder is named global_step and its number. Rename it.")
    given = checkpoint_config(checkpoint, (), trusted=trusted)
    keys = {name: value for name, value in given.given().items() if name not in LEFT_OUT}
    keys |= {name: value for name, value in ONE_PROCESS.items() if name in keys}
    keys |= {name: found_beside(checkpoint, keys[name]) for name in TOKENIZER_FILES if isinstance(keys.get(name), str)}
    config = config_from_dict({**keys, "load": str(checkpoint.resolve().parent), "iteration": int(step[1])})
    ready = load_ready_model(config)
    to_fast_format(ready.gpt)
    return OurModel(ready, str(path), config)


def found_beside(checkpoint: Path, file: str) -> str:
    """A file that a run named relative to where it started: as seen from here, or else from the nearest folder above the checkpoint that has it."""
    if Path(file).is_absolute() or Path(file).exists():
        return file
    places = (folder / file for folder in checkpoint.resolve().parents)
    return str(next((place for place in places if place.exists()), file))
