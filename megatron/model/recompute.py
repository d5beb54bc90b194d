"""Recomputation of activations: a part of the model keeps only its inputs, and the backward pass computes its other values again.

Groups of whole layers (`run_layers`), or chosen modules of every layer (`recompute_modules`). Both use PyTorch's checkpointing without reentrancy. It
keeps the gradients of everything that a part returns, losses included, and gives the random numbers of dropout again.

Shapes: B batch; S sequence; D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megatron.model.layer import TransformerLayer
from megatron.model.moe.layer import MoELayer
from megatron.model.positions import Places
from megatron.model.state import LayerState
from megatron.mpu.groups import ALONE, Group


class KeptInput(NamedTuple):
    """One process's share of a tensor, and what it takes to make it whole again."""

    share: Tensor
    shape: torch.Size
    device: torch.device


class KeptInputs:
    """How the inputs of recomputed layers are kept until the backward pass.

    group: the processes that hold equal inputs (a tensor-parallel group without sequence parallelism). Each keeps its share, and the backward pass
    gathers them. on_cpu: the inputs are kept in the CPU's memory.
    """

    def __init__(self, *, group: Group = ALONE, on_cpu: bool = False) -> None:
        self.group, self.on_cpu = group, on_cpu

    def __call__(self) -> AbstractContextManager[Any]:
        """A context in which checkpointing keeps its inputs in this way."""
        return nullcontext() if self.group.size == 1 and not self.on_cpu else saved_tensors_hooks(self._keep, self._restore)

    def _keep(self, whole: Tensor) -> KeptInput:
        share = whole.detach().reshape(-1)
        if self.group.size > 1:
            length = -(-whole.numel() // self.group.size)
            own = share[self.group.rank * length :][:length]
            share = torch.cat([own, own.new_zeros(length - own.numel())])
        return KeptInput(share.cpu() if self.on_cpu else share, whole.shape, whole.device)

    def _restore(self, kept: KeptInput) -> Tensor:
        whole = share = kept.share.to(kept.device)
        if self.group.size > 1:
            whole = share.new_empty(share.numel() * self.group.size)
            torch.distributed.all_gather_into_tensor(whole, share, group=self.group.handle)
        return whole[: kept.shape.numel()].view(kept.shape)


AS_THEY_ARE = KeptInputs()


def run_layers(layers: Sequence[TransformerLayer], state: LayerState, places: Places, *, together: int, kept: KeptInputs = AS_THEY_ARE) -> LayerState:
    """The state after the layers. Of each group of `together` layers only the hidden states before it are kept; the last group may be smaller."""
    for begin in range(0, len(layers), together):
        run, hidden_BSD = _group(layers[begin : begin + together], state, places)
        with kept():
            state = checkpoint(run, hidden_BSD, use_reentrant=False)
    return state


def _group(layers: Sequence[TransformerLayer], state: LayerState, places: Places) -> tuple[Callable[[Tensor], LayerState], Tensor]:
    """(the layers as a function of the hidden states, the hidden states)."""
    rest = state._replace(hidden_BSD=state.hidden_BSD.new_empty(0))

    def run(hidden_BSD: Tensor) -> LayerState:
        after = rest._replace(hidden_BSD=hidden_BSD)
        for layer in layers:
            after = layer(after, places)
        return after

    return run, state.hidden_BSD


class Recomputed:
    """A module's forward that keeps only its inputs in training."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.plain = module, module.forward

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the module's own forward gives."""
        if not self.module.training or not torch.is_grad_enabled():
            return self.plain(*inputs, **named)
        return checkpoint(self.plain, *inputs, use_reentrant=False, **named)


def _with_experts(layer: TransformerLayer) -> MoELayer | None:
    return layer.mlp if isinstance(layer.mlp, MoELayer) else None


def _experts(layer: TransformerLayer) -> nn.Module | None:
    moe = _with_experts(layer)
    return None if moe is None else moe.experts


MODULES: Mapping[str, Callable[[TransformerLayer], nn.Module | None]] = {
    "attention": lambda layer: layer.attention,
    "mlp": lambda layer: layer.mlp if _with_experts(layer) is None else None,
    "moe": _with_experts,
    "experts": _experts,
}
"""A name of `recompute_modules` -> that part of a layer; None where the layer has none."""


def recompute_modules(layers: Iterable[TransformerLayer], names: Iterable[str]) -> int:
    """From now on these modules of the layers are recomputed. Returns their number. `names` are keys of MODULES."""
    modules = [module for layer in layers for name in names if (module := MODULES[name](layer)) is not None]
    for module in modules:
        module.forward = Recomputed(module)  # hooks and parameters stay the module's
    return len(modules)
