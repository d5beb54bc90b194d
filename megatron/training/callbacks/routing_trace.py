"""Writes down which experts the tokens of chosen steps went to, for `tools/analysis/routing.py` and `tools/analysis/offload.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron.config.data import DataConfig
from megatron.config.logging import LoggingConfig
from megatron.data.tokenizer import NULL, build_tokenizer
from megatron.model.gpt import GPT
from megatron.model.moe.dispatch.all_to_all import AllToAllDispatcher
from megatron.model.moe.layer import MoELayer, MoEOutput
from megatron.monitor.routing_trace import Trace, TraceError, write_trace
from megatron.monitor.trace_layers import LayerChoices, Routed, choices_of, joined
from megatron.monitor.trace_parts import part_name, step_folder
from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)


class RoutingTraceCallback(Callback):
    """Watches the layers with experts during the chosen steps, and writes a file for each process that has its own tokens or layers.

    The model is not changed, and between the chosen steps nothing watches it. A forward that is repeated to save memory is not counted twice.
    """

    def __init__(self, config: LoggingConfig, data: DataConfig, folder: Path) -> None:
        self._steps, self._interval, self._most = set(config.routing_trace_steps or ()), config.routing_trace_interval, config.routing_trace_tokens
        self._data, self._folder = data, folder
        self._watch: Watch | None = None
        self._failed = False

    def before_training(self, trainer: Trainer) -> None:
        self._begin(trainer)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._watch is not None:
            self._watch.end()
            if not self._failed and (found := self._watch.found(trainer.state.iteration)) is not None:
                self._write(trainer, found)
            self._watch = None
        self._begin(trainer)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.end()

    def _begin(self, trainer: Trainer) -> None:
        step = trainer.state.iteration + 1
        wanted = step in self._steps or (self._interval is not None and step % self._interval == 0)
        if wanted and step <= trainer.plan.train_iters and trainer.topology.tensor_rank == 0:
            self._watch = Watch(trainer.engine.module, self._most)

    def _write(self, trainer: Trainer, trace: Trace) -> None:
        place = trainer.topology.place
        path = self._folder / step_folder(trainer.state.iteration) / part_name(place.data, place.pipe)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_trace(path, self._with_texts(trace))
        except (OSError, TraceError) as error:
            self._failed = True
            trainer.failures.append(str(error) if isinstance(error, TraceError) else f"routing_trace_dir: {path} cannot be written: {error}.")
            log.error("%s", trainer.failures[-1])
            return
        log.info("Routing of step %d: %s", trainer.state.iteration, path)

    def _with_texts(self, trace: Trace) -> Trace:
        if trace.token_T is None or self._data.tokenizer_type == NULL:
            return trace
        tokenizer = build_tokenizer(self._data)
        known = [token for token in np.unique(trace.token_T).tolist() if token < tokenizer.vocab_size]
        return trace._replace(pieces={token: "<end>" if token == tokenizer.eod else tokenizer.decode([token]) for token in known})


class Watch:
    """Hooks on the embedding and on the layers with experts, for one step."""

    def __init__(self, gpt: GPT, most: int) -> None:
        """`most`: tokens that are kept."""
        self._most, self._seen = most, 0
        layers = zip(gpt.layer_numbers, gpt.layers, strict=True)
        self._moe: dict[int, MoELayer] = {number: layer.mlp for number, layer in layers if isinstance(layer.mlp, MoELayer)}
        self._chosen: dict[int, list[LayerChoices]] = {number: [] for number in self._moe}
        self._shapes: dict[int, list[tuple[int, int]]] = {number: [] for number in self._moe}
        self._tokens: list[npt.NDArray[np.int64]] = []
        self._handles = [layer.register_forward_hook(self._hook(number)) for number, layer in self._moe.items()]
        if gpt.is_first:
            self._handles.append(gpt.sequential["0"].register_forward_pre_hook(self._read))

    def end(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def found(self, step: int) -> Trace | None:
        """What was seen. None: this process has no layer with experts, or the model was not run."""
        numbers = sorted(self._moe)
        if not numbers or not self._chosen[numbers[0]]:
            return None
        parts = [joined([self._chosen[number][call] for number in numbers]) for call in range(len(self._chosen[numbers[0]]))]
        routed, counts = _in_a_row(parts), [self._moe[number].context.num_experts for number in numbers]
        texts = [row for shape in self._shapes[numbers[0]] for row in [shape[1]] * shape[0]]
        tokens = np.concatenate(self._tokens) if self._tokens else None
        lores = 0 if routed.lore_TLKU is None else max(_lores_of(self._moe[number]) for number in numbers)
        trace = Trace(
            np.full(len(routed.expert_TLK), step, np.int64),
            numbers,
            routed.expert_TLK.astype(np.int64),
            max(counts),
            routed.lore_TLKU,
            lores,
            routed.weight_TLK,
            tokens,
            np.repeat(np.arange(len(texts)), texts),
            np.zeros(len(routed.expert_TLK), np.int64),
            ("training",),
            counts,
            model=f"step {step}",
        )
        return _shortened(trace, self._most)

    def _hook(self, number: int) -> Any:
        def after(_: nn.Module, __: Any, output: MoEOutput) -> None:
            if self._counts(number):
                decision, shape = output.decision, output.decision.routing.batch_shape
                if isinstance(self._moe[number].dispatcher, AllToAllDispatcher):
                    decision = decision._replace(lores=None)  # they are of the rows that this process received, not of its tokens
                self._shapes[number].append(shape if shape is not None else (1, len(decision.routing.expert_TK)))
                self._chosen[number].append(choices_of(decision.chosen()))

        return after

    def _read(self, embedding: nn.Module, given: tuple[Any, ...]) -> None:
        if embedding.training and _is_first_forward() and sum(map(len, self._tokens)) < self._most:
            tokens_BS: Tensor = given[0]
            self._tokens.append(tokens_BS.flatten().cpu().numpy())

    def _counts(self, number: int) -> bool:
        return _is_first_forward() and sum(len(part.expert_TK) for part in self._chosen[number]) < self._most and self._moe[number].training


def _is_first_forward() -> bool:
    """Not one that a backward repeats because activations were not kept."""
    return torch._C._current_graph_task_id() == -1


def _in_a_row(parts: Sequence[Routed]) -> Routed:
    lores = [part.lore_TLKU for part in parts if part.lore_TLKU is not None]
    experts, weights = np.concatenate([part.expert_TLK for part in parts]), np.concatenate([part.weight_TLK for part in parts])
    return Routed(experts, weights, np.concatenate(lores) if lores else None)


def _lores_of(layer: MoELayer) -> int:
    """LoREs of one expert. Zero, copy and constant experts have none."""
    return int(getattr(layer.experts, "num_lores", 0)) // (layer.context.num_experts - layer.context.num_zero_computation)


def _shortened(trace: Trace, most: int) -> Trace:
    """Without the tokens beyond `most`."""
    names = ("step_T", "expert_TLK", "lore_TLKM", "weight_TLK", "token_T", "sequence_T", "domain_T")
    return trace._replace(**{name: values[:most] for name in names if (values := getattr(trace, name)) is not None})
