"""One optimizer step: micro-batches through the engine, and what came of it.

Shapes: B micro-batch, S sequence length, A auxiliary losses, X MoE layers, E experts, G = E * M LoREs of a layer
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.model.gpt import GPTOutput
from megatron.training.loss import next_token_targets, poison_if_not_finite
from megatron.training.optimizer import set_learning_rate
from megatron.training.phases import Phases


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured, averaged (losses) or summed (loads) over micro-batches and processes."""

    lm_loss: float
    aux_losses: tuple[float, ...]
    """Unweighted, summed over the MoE layers, in the order of `moe_losses`."""
    expert_load_XE: Tensor
    """Tokens per expert."""
    lore_load_XG: Tensor
    """Tokens per LoRE; no columns without LoREs."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    applied: bool
    """False: the gradients were not finite (or fp16 overflowed) and the step changed nothing."""
    loss_scale: float | None
    """None: no loss scaling."""
    seconds: float
    """Waiting for data, forward, backward and update, until the device was done."""
    phase_seconds: dict[str, float]
    """`forward` (with `batch generator`, the waiting for data, in it), `backward` and `optimizer`; GPT-NeoX's names."""


class Tally:
    """Sums the outputs of several micro-batches on the device; `totals` makes them numbers once, over all processes."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._expert_loads: list[Tensor] = []
        self._lore_loads: list[Tensor] = []

    def add(self, output: GPTOutput) -> None:
        assert output.lm_loss is not None
        self._losses.append(torch.cat([output.lm_loss.detach().float().reshape(1), output.aux_losses_A.detach().float()]))
        self._expert_loads.append(output.expert_load_XE)
        self._lore_loads.append(output.lore_load_XG)

    def totals(self) -> tuple[list[float], Tensor, Tensor]:
        """Mean losses (language model first), summed expert load and LoRE load, over micro-batches and processes."""
        losses = torch.stack(self._losses).mean(0)
        loads = [torch.stack(self._expert_loads).sum(0), torch.stack(self._lore_loads).sum(0)]
        if torch.distributed.is_initialized() and (world_size := torch.distributed.get_world_size()) > 1:
            torch.distributed.all_reduce(losses)
            losses /= world_size
            for load in loads:
                if load.numel():
                    torch.distributed.all_reduce(load)
        return losses.tolist(), loads[0].cpu(), loads[1].cpu()


def take_step(
    engine: Any, batches: Iterator[dict[str, Tensor]], *, learning_rate: float, masked_token: int | None, before_update: Callable[[], None]
) -> StepMetrics:
    """Takes one optimizer step of `gradient_accumulation_steps` micro-batches with a DeepSpeed engine (ZeRO 0 to 3).

    `before_update` is called once, when the gradients are complete and the weights are not yet changed.
    """
    started = time.perf_counter()
    set_learning_rate(engine.optimizer, learning_rate)
    tally, phases = Tally(), Phases(torch.device(engine.device))
    for left in reversed(range(engine.gradient_accumulation_steps())):
        with phases("forward"):
            with phases("batch generator"):
                batch = next(batches)
            output = forward(engine, batch, masked_token=masked_token)
        assert output.loss is not None
        with phases("backward"):
            engine.backward(poison_if_not_finite(output.loss))
        if not left:
            before_update()
        with phases("optimizer"):
            engine.step()
        tally.add(output)
    (lm_loss, *aux_losses), expert_load, lore_load = tally.totals()
    return StepMetrics(
        lm_loss=lm_loss,
        aux_losses=tuple(aux_losses),
        expert_load_XE=expert_load,
        lore_load_XG=lore_load,
        learning_rate=learning_rate,
        grad_norm=float(engine.get_global_grad_norm() or 0.0),
        applied=bool(engine.was_step_applied()),
        loss_scale=float(engine.optimizer.cur_scale) if engine.fp16_enabled() else None,
        seconds=time.perf_counter() - started,
        phase_seconds=phases.seconds(),
    )


def forward(engine: Any, batch: dict[str, Tensor], *, masked_token: int | None) -> GPTOutput:
    """One micro-batch through the model, with the loss."""
    there = {key: values.to(engine.device, non_blocking=True) for key, values in batch.items()}
    tokens, labels, mask = next_token_targets(there["text"], there.get("label"), masked_token=masked_token)
    documents = {"document_BS": there["document"][:, :-1].contiguous()} if "document" in there else {}
    output: GPTOutput = engine(tokens, labels_BS=labels, loss_mask_BS=mask, **documents)
    return output
