"""Loss on data that the model does not learn from.

Shapes: B micro-batch, S sequence, C corpora
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.config.training import TrainingConfig
from megatron.data.blend import BlendedDataset
from megatron.data.loader import TextDataset, batches
from megatron.model.gpt import GPTOutput
from megatron.mpu.collectives import sum_over_replicas_and_stages
from megatron.mpu.topology import Topology
from megatron.training.labels import masks
from megatron.training.loss import next_token_targets
from megatron.training.step import forward, tally_of


def evaluates_after(training: TrainingConfig, step: int) -> bool:
    """Whether there is an evaluation after this step. The one at the end of training does not count."""
    return step % training.eval_interval == 0 or step in (training.extra_eval_iters or ())


def evaluations_until(training: TrainingConfig, step: int) -> int:
    """How many evaluations there are up to this step, the one after it included."""
    extra = {other for other in training.extra_eval_iters or () if other <= step and (other % training.eval_interval or not other)}
    return step // training.eval_interval + len(extra)


class Evaluation(NamedTuple):
    """Mean losses per token."""

    loss: float | None
    """The mean over all data that was read. None: no token of it counts."""
    by_corpus: dict[str, float]
    """Name of a corpus -> the mean over the part of it that was read. Corpora without a token that was read and counts are left out. Empty if there
    is
    only one corpus."""


def evaluate(engine: Any, dataset: TextDataset, topology: Topology, *, span: range, masked_token: int | None, per_token: bool = True) -> Evaluation:
    """Losses over the micro-batches `span` of every process: the sum over the tokens that count, divided by their number.

    With `per_token` False the loss is the mean of the micro-batches' means, as in GPT-NeoX. It depends on the arguments only, so a resumed run
    evaluates on the same samples; nothing random is drawn.
    """
    stream = batches(
        dataset,
        micro_batch=engine.train_micro_batch_size_per_gpu(),
        rank=topology.data_parallel_rank,
        world_size=topology.data_parallel_size,
        start_iteration=span.start,
    )
    corpora = dataset.names if isinstance(dataset, BlendedDataset) else ()
    tally, sums, any_mask = tally_of(engine), Sums(len(corpora), engine.device), False
    engine.eval()
    try:
        with torch.no_grad():
            for _ in span:
                batch = next(stream)
                masked = masks(batch, masked_token)
                output = forward(engine, batch, masked_token=masked_token)
                tally.add(output)
                if engine.module.is_last and (masked or corpora):
                    sums.add(output, batch, masked_token=masked_token)
                any_mask |= masked
    finally:
        engine.train()
        stream.close()
    whole, *parts = sums.means() if any_mask or corpora else (None,)
    loss = whole if any_mask and (per_token or whole is None) else tally.totals()[0]
    return Evaluation(loss, {name: part for name, part in zip(corpora, parts, strict=True) if part is not None})


class Sums:
    """Sums of losses and numbers of tokens: of everything, and of each corpus."""

    def __init__(self, corpora: int, device: Any) -> None:
        self.sum_C2 = torch.zeros(1 + corpora, 2, dtype=torch.float64, device=device)

    def add(self, output: GPTOutput, batch: dict[str, Tensor], *, masked_token: int | None) -> None:
        """Adds a micro-batch; its "corpus" says which corpus each sample is of."""
        assert output.token_loss_BS is not None
        loss_BS = output.token_loss_BS.double()
        mask_BS = next_token_targets(batch["text"], batch.get("label"), masked_token=masked_token).loss_mask_BS
        counts_BS = torch.ones_like(loss_BS) if mask_BS is None else mask_BS.to(loss_BS)
        sum_B2 = torch.stack([(loss_BS * counts_BS).sum(1), counts_BS.sum(1)], 1)
        self.sum_C2[0] += sum_B2.sum(0)
        if "corpus" in batch:
            self.sum_C2.index_add_(0, 1 + batch["corpus"].to(sum_B2.device), sum_B2)

    def means(self) -> list[float | None]:
        """Means of everything and of each corpus, over all processes. None: no token counts. Collective."""
        return [total / count if count else None for total, count in sum_over_replicas_and_stages(self.sum_C2).tolist()]


def evaluation_logits(engine: Any, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of the engine's model in evaluation mode, on its device. Collective under ZeRO 3 and in a pipeline."""
    engine.eval()
    try:
        with torch.no_grad():
            length, region = tokens_BS.shape[1], engine.module.region
            extra = -length % region.group.size if region.sequence else 0  # tokens at the end change nothing before them
            output: GPTOutput = engine(torch.nn.functional.pad(tokens_BS, (0, extra)).to(engine.device))
    finally:
        engine.train()
    assert output.logits_BSV is not None
    return output.logits_BSV[:, :length]
