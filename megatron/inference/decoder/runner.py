"""The compiled runner: prompts through the model's own forward, new tokens through decoding's kernels.

Shapes: N rows; D model width; V the tokenizer's vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.inference.decoder.build import Decoder, as_it_lies, build_decoder, check_served
from megatron.inference.decoder.int8 import Int8Store
from megatron.inference.decoder.parts import NotServed
from megatron.inference.decoder.steps import Rows
from megatron.inference.model import ReadyModel
from megatron.inference.routing_trace import RoutingTrace
from megatron.inference.runner import ModuleRunner, TextState
from megatron.kernels.backends import choose
from megatron.kernels.decode import OP
from megatron.model.attention.cache import CacheError
from megatron.model.positions import Places

log = logging.getLogger(__name__)
ROWS = 16
"""Most tokens of a prompt that one call of the kernels reads. Longer prompts go through the model's own forward, if its weights are there: for many
tokens it needs less time."""


@dataclass
class PlacedState(TextState):
    """With the addresses of the caches."""

    addresses: list[tuple[int, int]] = field(default_factory=list)
    """(keys, values) of each layer."""


def reason_against(ready: ReadyModel) -> str | None:
    """Why the compiled runner cannot run the model, before anything is built. None: nothing is known against it.

    Raises KernelUnavailable where the configuration names it and it cannot run on the device.
    """
    chosen = choose(OP, ready.decoding.backend, ready.device.type)
    if ready.decoding.backend == "reference":
        return "kernel_backends: {decode: reference} asks for it"
    if chosen.runs != "compiled":
        return chosen.because or f"the model is on {ready.device.type}"
    try:
        check_served(ready.gpt)
    except NotServed as error:
        return f"the compiled kernels do not serve {error}"
    return None


def build_compiled_runner(ready: ReadyModel) -> CompiledRunner:
    """The runner of a model that nothing speaks against. With int8 weights the model's own are freed."""
    store = Int8Store() if ready.decoding.weights == "int8" else None
    decoder = build_decoder(ready.gpt, ready.sizes, ready.tokenizer.vocab_size, store or as_it_lies)
    if store is not None:
        store.release(ready.gpt)
    others = "".join(f"; by the model's own modules: {what}, in {count} layers" for what, count in decoder.modules.items())
    kept = "shared" if store is None else "int8" if ready.offloaded is None else "int8 (but for the experts that move)"
    log.info("new tokens: compiled, %s weights%s.", kept, others)
    return CompiledRunner(ready, decoder, whole_prompts=store is not None)


class CompiledRunner(ModuleRunner):
    """Rounds to the model's format only what the caches keep: between the products numbers are float32."""

    def __init__(self, ready: ReadyModel, decoder: Decoder, *, whole_prompts: bool) -> None:
        """`whole_prompts`: the kernels read all prompts, because the model's own weights are gone."""
        super().__init__(ready)
        self._decoder = decoder
        self._longest = ready.context_length if whole_prompts else ROWS

    def open(self, capacity: int) -> PlacedState:
        """See Runner."""
        caches = super().open(capacity).caches
        return PlacedState(caches, [(cache.keys_BHPd.data_ptr(), cache.values_BHPd.data_ptr()) for cache in caches])

    @torch.inference_mode()
    def prefill(self, state: TextState, tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        """See Runner."""
        if not tokens or len(tokens) > self._longest:
            return super().prefill(state, tokens, trace)
        for begin in range(0, len(tokens), ROWS):
            part = tokens[begin : begin + ROWS]
            hidden_ND = self._advance([state] * len(part), part, trace)
        return self._head(hidden_ND[-1:])[0]

    @torch.inference_mode()
    def decode(self, states: Sequence[TextState], tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        """See Runner. All texts go through the model together."""
        return self._head(self._advance(states, tokens, trace))

    def _advance(self, states: Sequence[TextState], tokens: Sequence[int], trace: RoutingTrace | None) -> Tensor:
        """hidden_ND after the last layer. A text that is named several times gets its tokens in order."""
        rows = self._rows(states, chosen=trace is not None)
        places = Places(position_BS=torch.tensor([rows.lengths]))
        x_ND = self._decoder.embed(torch.tensor([tokens]), places)[0].float().contiguous()
        for layer in self._decoder.layers:
            layer(x_ND, rows)
        for state, length in zip(states, rows.lengths, strict=True):
            state.length = length + 1
        if trace is not None and rows.chosen is not None:
            trace.add(rows.chosen)
        return x_ND

    def _rows(self, states: Sequence[TextState], *, chosen: bool) -> Rows:
        lengths: list[int] = []
        seen: dict[int, int] = {}
        for state in states:
            seen[id(state)] = seen.get(id(state), state.length - 1) + 1
            lengths.append(seen[id(state)])
        rooms = [state.capacity for state in states]
        for length, room in zip(lengths, rooms, strict=True):
            if length >= room:
                raise CacheError(f"{length} + 1 tokens do not fit into a cache of {room} positions; make it as long as prompt and answer together")
        caches = [list(layer) for layer in zip(*(state.caches for state in states), strict=True)]
        placed = [state.addresses for state in states if isinstance(state, PlacedState)]
        addresses = [[place[0] for place in layer] + [place[1] for place in layer] for layer in zip(*placed, strict=True)]
        return Rows(lengths, rooms, caches, addresses, torch.get_num_threads(), [] if chosen else None)

    def _head(self, hidden_ND: Tensor) -> Tensor:
        logits_NV = torch.empty(len(hidden_ND), self._decoder.head.rows)
        self._decoder.head(hidden_ND, logits_NV, torch.get_num_threads())
        return logits_NV
