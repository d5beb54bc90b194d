"""One optimizer step: the micro-batches go through the engine, and the results are measured.

Shapes: B micro-batch, S sequence length, X MoE layers, E experts
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.model.embedding import LossMask
from megatron.model.gpt import GPTOutput
from megatron.model.state import LayerState, RouterReport
from megatron.mpu.collectives import sum_over_data_parallel, sum_over_replicas_and_stages
from megatron.mpu.groups import current_groups
from megatron.training.labels import Labels, look_ahead
from megatron.training.loss import next_token_targets, poison_if_not_finite
from megatron.training.optimizer import set_learning_rate
from megatron.training.phases import Phases


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured, averaged (losses) or summed (loads) over micro-batches and processes."""

    lm_loss: float
    """If some predictions do not count: the sum over those that count, divided by their number. NaN if no prediction of the step counts."""
    aux_losses: tuple[float, ...]
    """Unweighted, summed over the MoE layers, in the order of `moe_losses`."""
    router: RouterReport
    """The report of the MoE layers, on the CPU: losses and statistics are averaged, loads are summed."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    applied: bool
    """False: the step changed nothing, because the gradients were not finite (or fp16 overflowed) or no prediction counted."""
    loss_scale: float | None
    """None: no loss scaling."""
    seconds: float
    """Time of waiting for data, forward, backward and update, until the device has finished."""
    phase_seconds: dict[str, float]
    """Times under GPT-NeoX's names: `forward`, `backward` and `optimizer`. `forward` contains `batch generator`, the time of waiting for data."""
    labels: Labels | None = None
    """How many predictions counted. None: all of them count."""

    @property
    def is_empty(self) -> bool:
        """Whether no prediction of this step counts. Then there is no loss and nothing to learn."""
        return self.labels is not None and not self.labels.counted


class Tally:
    """Sums the outputs of several micro-batches on the device. `totals` turns the sums into numbers once, over all processes.

    `nothing`: the output that is counted in place of this process's own, where another stage of the pipeline has the losses. None: its own counts.
    """

    def __init__(self, nothing: RouterReport | None = None) -> None:
        self._nothing = nothing
        self._losses: list[Tensor] = []
        self._reports: list[RouterReport] = []
        self._scores: list[Tensor] = []

    def add(self, output: GPTOutput | LayerState) -> None:
        lm_loss = output.lm_loss if isinstance(output, GPTOutput) else output.report.statistics_XI.new_zeros(())
        assert lm_loss is not None
        self._losses.append(lm_loss.detach().float())
        self._reports.append(RouterReport(*(part.detach() for part in output.report)))
        if output.scores_XC is not None:
            self._scores.append(output.scores_XC)

    @property
    def load_XE(self) -> Tensor:
        """int64: the expert load so far, over all processes, on the device."""
        return sum_over_data_parallel(torch.stack([report.expert_load_XE for report in self._reports]).sum(0))

    def scores_XC(self, moe_layers: int, width: int) -> Tensor | None:
        """int64: the counts of scores of the step, over all processes, on the CPU. None: no router counts (`width` is 0)."""
        if not width:
            return None
        if self._nothing is None:
            return sum_over_replicas_and_stages(torch.stack(self._scores).sum(0)).cpu()
        return sum_over_replicas_and_stages(torch.zeros(moe_layers, width, dtype=torch.int64, device=self._losses[0].device)).cpu()

    def totals(self) -> tuple[float, RouterReport]:
        """(mean loss of the language model, report), over micro-batches and processes."""
        device = self._losses[0].device
        reports = self._reports if self._nothing is None else [RouterReport(*(part.to(device) for part in self._nothing))]
        parts = [torch.stack(part) for part in zip(*reports, strict=True)]
        means = torch.cat([torch.stack(self._losses).mean()[None], *(parts[i].mean(0).flatten() for i in (0, 3))])
        loads = torch.cat([parts[i].sum(0).flatten() for i in (1, 2)])
        means = sum_over_replicas_and_stages(means).cpu() / current_groups().data.size
        loads = sum_over_replicas_and_stages(loads).cpu()
        losses, statistics = means[1:].split([parts[0][0].numel(), parts[3][0].numel()])
        experts, lores = loads.split([parts[1][0].numel(), parts[2][0].numel()])
        shaped = (flat.view(part.shape[1:]) for flat, part in zip((losses, experts, lores, statistics), parts, strict=True))
        return means[0].item(), RouterReport(*shaped)


def take_step(
    engine: Any,
    batches: Iterator[dict[str, Tensor]],
    *,
    learning_rate: float,
    masked_token: int | None,
    per_token: bool = True,
    before_update: Callable[[], None],
) -> StepMetrics:
    """Takes one optimizer step of `gradient_accumulation_steps` micro-batches with a DeepSpeed engine (ZeRO 0 to 3).

    If some predictions do not count, the loss is the mean over all predictions of the step that count, in all micro-batches and processes. The
    gradient is that of this loss. With `per_token` False the loss is the mean of the micro-batches' own means, as in GPT-NeoX. A step without a
    prediction that counts changes nothing. `before_update` is called once, when the gradients are complete and the weights have not changed yet.
    """
    started = time.perf_counter()
    set_learning_rate(engine.optimizer, learning_rate)
    phases, steps = Phases(torch.device(engine.device)), engine.gradient_accumulation_steps()
    with phases("forward"), phases("batch generator"):
        batches, labels = look_ahead(batches, steps, masked_token=masked_token, device=engine.device)
    if labels is not None and not labels.counted:
        return empty_step(engine, labels, learning_rate=learning_rate, seconds=time.perf_counter() - started)
    total = labels.per_micro_batch if labels is not None and per_token else None
    feed = Feed(engine, batches, phases, masked_token=masked_token, total=total)
    if hasattr(engine, "take_micro_batches"):
        engine.take_micro_batches(feed, phases=phases, before_update=before_update)
    else:
        take_micro_batches(engine, feed, steps=steps, phases=phases, before_update=before_update)
    lm_loss, router = feed.tally.totals()
    scores_XC = feed.tally.scores_XC(engine.module.moe_rows, engine.module.scores_width)
    applied = bool(engine.was_step_applied())
    if applied:
        engine.module.update_balance(router.expert_load_XE, scores_XC)
    return StepMetrics(
        lm_loss=lm_loss,
        aux_losses=tuple(router.aux_losses_XA.sum(0).tolist()),
        router=router,
        learning_rate=learning_rate,
        grad_norm=float(engine.get_global_grad_norm() or 0.0),
        applied=applied,
        loss_scale=loss_scale(engine),
        seconds=time.perf_counter() - started,
        phase_seconds=phases.seconds(),
        labels=labels,
    )


class Feed:
    """The inputs of a step's micro-batches, one after the other, and the tally of their outputs."""

    def __init__(self, engine: Any, batches: Iterator[dict[str, Tensor]], phases: Phases, *, masked_token: int | None, total: float | None) -> None:
        self._engine, self._batches, self._phases = engine, batches, phases
        self._masked_token, self._total = masked_token, total
        self._earlier_load_XE: Tensor | None = None
        self.tally = tally_of(engine)

    def next_batch(self) -> dict[str, Tensor]:
        """The next micro-batch."""
        with self._phases("batch generator"):
            return next(self._batches)

    @property
    def settings(self) -> dict[str, Any]:
        """How `model_inputs` treats it."""
        return {"masked_token": self._masked_token, "total": self._total, "earlier_load_XE": self._earlier_load_XE}

    def next_inputs(self) -> dict[str, Any]:
        """The arguments of `GPT.forward` for the next micro-batch."""
        return model_inputs(self._engine, self.next_batch(), **self.settings)

    def add(self, output: GPTOutput | LayerState) -> None:
        """Counts what the model, or this process's stage of it, gave for a micro-batch."""
        self.tally.add(output)
        if self._engine.module.wants_earlier_load:
            self._earlier_load_XE = self.tally.load_XE


def tally_of(engine: Any) -> Tally:
    """A tally for the outputs of this engine."""
    return Tally(None if engine.module.is_last else engine.module.empty_report())


def take_micro_batches(engine: Any, feed: Feed, *, steps: int, phases: Phases, before_update: Callable[[], None]) -> None:
    """Forward and backward of each micro-batch, and the update after the last, where this process has the whole model."""
    for left in reversed(range(steps)):
        with phases("forward"):
            output = forward(engine, feed.next_batch(), **feed.settings)
        feed.add(output)
        assert output.loss is not None
        with phases("backward"):
            backward(engine, poison_if_not_finite(output.loss))
        if not left:
            before_update()
        with phases("optimizer"):
            engine.step()


def empty_step(engine: Any, labels: Labels, *, learning_rate: float, seconds: float) -> StepMetrics:
    """The metrics of a step whose micro-batches have nothing to predict. The model is not run."""
    router = engine.module.empty_report()
    return StepMetrics(
        lm_loss=math.nan,
        aux_losses=tuple(router.aux_losses_XA.sum(0).tolist()),
        router=router,
        learning_rate=learning_rate,
        grad_norm=0.0,
        applied=False,
        loss_scale=loss_scale(engine),
        seconds=seconds,
        phase_seconds=dict.fromkeys(("forward", "batch generator", "backward", "optimizer"), 0.0),
        labels=labels,
    )


def backward(engine: Any, loss: Tensor) -> None:
    """`engine.backward`. For 16-bit weights at stage 0, where DeepSpeed leaves the loss scale to its optimizer, the loss is scaled here."""
    scale = getattr(engine.optimizer, "scale_loss", None)
    engine.backward(loss if scale is None else scale(loss))


def loss_scale(engine: Any) -> float | None:
    """None: no loss scaling."""
    return float(engine.optimizer.cur_scale) if engine.fp16_enabled() else None


def forward(engine: Any, batch: dict[str, Tensor], **settings: Any) -> GPTOutput:
    """Runs one micro-batch through the model; the settings are those of `model_inputs`."""
    output: GPTOutput = engine(**model_inputs(engine, batch, **settings))
    return output


def model_inputs(
    engine: Any, batch: dict[str, Tensor], *, masked_token: int | None, total: float | None = None, earlier_load_XE: Tensor | None = None
) -> dict[str, Any]:
    """The arguments of `GPT.forward` for one micro-batch. The loss is the sum over the predictions that count, divided by `total` (None: by their
    number). `earlier_load_XE` as `GPT.forward` takes it.
    """
    there = {key: values.to(engine.device, non_blocking=True) for key, values in batch.items()}
    tokens, labels, mask = next_token_targets(there["text"], there.get("label"), masked_token=masked_token)
    documents = {"document_BS": there["document"][:, :-1].contiguous()} if "document" in there else {}
    divisor = None if total is None else torch.tensor(total, dtype=torch.float32, device=engine.device)
    loss_mask = None if mask is None else LossMask(mask, divisor)
    return {"tokens_BS": tokens, "labels_BS": labels, "loss_mask": loss_mask, "earlier_load_XE": earlier_load_XE, **documents}
