"""What runs the model for generation: it reads a prompt, then adds one token to each of several texts.

Shapes: N texts; B = 1; S tokens of one call; V the tokenizer's vocabulary (the padding of the model's vocabulary is cut, so it is never chosen).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel
from megatron.inference.offload.record import Recorder
from megatron.inference.routing_trace import RoutingTrace
from megatron.kernels.registry import KernelUnavailable
from megatron.model.attention import LayerCache, build_cache

log = logging.getLogger(__name__)
PREFILL_CHUNK = 1024
"""Most tokens of a prompt in one pass through the model: it bounds the memory that activations take."""


@dataclass
class TextState:
    """The model's memory of one text: its keys and values, allocated once for the prompt and its longest answer."""

    caches: list[LayerCache]
    """One for each layer of the model, with batch 1."""

    @property
    def length(self) -> int:
        """Tokens that the model has seen."""
        return self.caches[0].length

    @length.setter
    def length(self, length: int) -> None:
        for cache in self.caches:
            cache.length = length

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.caches[0].keys_BHPd.shape[2]


class Runner(Protocol):
    """Runs one model for many texts. It keeps nothing of a text: a text's whole memory is its TextState."""

    def open(self, capacity: int) -> TextState:
        """The memory of a new text of at most `capacity` tokens. Raises CacheError if the model has fewer positions."""
        ...

    def prefill(self, state: TextState, tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        """logits_V, float32, of the token after `tokens`, which are added to the text. Raises CacheError if there is no room.

        `trace` gets the experts of each token. None: nobody wants them.
        """
        ...

    def decode(self, states: Sequence[TextState], tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        """logits_NV, float32: adds one token to each text and gives what may follow. The texts may have different lengths.

        `trace` gets the experts of each of the N tokens. None: nobody wants them. Raises CacheError if there is no room.
        """
        ...


class ModuleRunner:
    """Runs the model's own `forward`, on any device. The stages of a pipeline call each method together, with the same tokens."""

    def __init__(self, ready: ReadyModel) -> None:
        self._ready = ready

    def open(self, capacity: int) -> TextState:
        """See Runner."""
        ready = self._ready
        return TextState(build_cache(ready.sizes, 1, capacity, dtype=ready.dtype, device=str(ready.device)))

    @torch.inference_mode()
    def prefill(self, state: TextState, tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        """See Runner."""
        if not tokens:
            raise ValueError("prefill of no tokens: a text has at least one")
        for begin in range(0, len(tokens), PREFILL_CHUNK):
            tokens_BS = torch.tensor([tokens[begin : begin + PREFILL_CHUNK]], dtype=torch.int64, device=self._ready.device)
            if trace is None:
                logits_BV = self._ready.gpt.last_logits(tokens_BS, cache=state.caches)
            else:
                logits_BV, decisions = self._ready.gpt.traced_logits(tokens_BS, cache=state.caches)
                trace.add([decision.chosen() for decision in decisions])
        return logits_BV[0, : self._ready.tokenizer.vocab_size].float()

    def decode(self, states: Sequence[TextState], tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        """See Runner. The texts go through the model one after the other."""
        return torch.stack([self.prefill(state, [token], trace) for state, token in zip(states, tokens, strict=True)])


class RecordingRunner(ModuleRunner):
    """Tells a recorder every pass through the model (`expert_offload.record`)."""

    def __init__(self, ready: ReadyModel, recorder: Recorder) -> None:
        super().__init__(ready)
        self._recorder = recorder

    def prefill(self, state: TextState, tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        """See Runner."""
        own = RoutingTrace()
        logits_V = super().prefill(state, tokens, own)
        for call in own.calls:
            self._recorder.add(call)
            if trace is not None:
                trace.add(call)
        return logits_V


def build_runner(ready: ReadyModel) -> Runner:
    """The fastest runner that can run this model on this machine; the log says which, and what the compiled one does not serve.

    Raises KernelUnavailable where `kernel_backends: {decode: compiled}` cannot run, and InferenceError where int8 weights cannot.
    """
    from megatron.inference.decoder.runner import build_compiled_runner, reason_against

    forward_only = None if ready.offloaded is None else ready.offloaded.options.forward_only
    reason = f"{forward_only} needs the model's own forward" if forward_only is not None else reason_against(ready)
    if reason is None:
        return build_compiled_runner(ready)
    if ready.decoding.weights == "int8":
        raise InferenceError(f"inference_weights: int8 needs the compiled decoder, and it cannot run: {reason}.")
    if ready.decoding.backend == "compiled":
        raise KernelUnavailable(f"kernel_backends: {{decode: compiled}} cannot run: {reason}. Remove it, or write decode: auto.")
    log.info("new tokens: the model's own forward (%s).", reason)
    recorder = None if ready.offloaded is None else ready.offloaded.recorder
    return ModuleRunner(ready) if recorder is None else RecordingRunner(ready, recorder)
