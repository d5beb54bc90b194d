"""Log-likelihoods of many rows in batches, the longest first, on all processes that have the model.

Shapes: B rows of a batch; S positions; N positions whose logits are needed; V padded vocabulary; R requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.inference.errors import InferenceError
from megatron.inference.harness.forward import Forward
from megatron.inference.harness.requests import Row, Scored, batches_of, rows_of

Progress = Callable[[int, int], None]
"""Called with the requests and tokens that are done since the last call."""


class Likelihood(NamedTuple):
    """The answer to one request."""

    logprob: float
    """Sum of log p over the continuation."""
    greedy: bool
    """Whether every token of it is the most likely one."""


class Batching(NamedTuple):
    """How rows are put together."""

    tokens: int
    """Most tokens of a batch, padding included."""
    alone: bool = False
    """Whether every part is a batch of its own, without padding: needed where a router looks at other tokens."""

    def batches(self, parts: Sequence[Scored], *, merge: bool) -> list[list[Row]]:
        """`merge`: parts that begin alike may share a row."""
        return batches_of(rows_of(parts, merge=merge and not self.alone), 0 if self.alone else self.tokens)


def score_parts(forward: Forward, parts: Sequence[Scored], requests: int, *, batching: Batching, progress: Progress) -> list[Likelihood]:
    """The likelihood of each of the R requests, whose parts these are. Every process of the model calls it with the same parts.

    Raises InferenceError when the model's output is not finite.
    """
    batches = batching.batches(parts, merge=True)
    logprob_R = torch.zeros(requests, dtype=torch.float64)
    misses_R = torch.zeros(requests, dtype=torch.float64)
    for batch, own in own_batches(forward, batches):
        tokens_BS, chosen_BS = padded(batch, forward.multiple)
        values = read_logits(forward.logits(tokens_BS, chosen_BS), batch, chosen_BS)
        if own:
            for part, (logprob, misses) in values:
                logprob_R[part.request] += logprob
                misses_R[part.request] += misses
        report(progress, batch, forward)
    logprob_R, misses_R = (over_replicas(forward, tensor_R) for tensor_R in (logprob_R, misses_R))
    check_finite(logprob_R)
    return [Likelihood(logprob, misses == 0) for logprob, misses in zip(logprob_R.tolist(), misses_R.tolist(), strict=True)]


def sum_parts(forward: Forward, parts: Sequence[Scored], requests: int, *, batching: Batching, progress: Progress) -> list[float]:
    """Only the log-likelihood of each request, from the losses: no logits are held, so the parts may be long."""
    batches = batching.batches(parts, merge=False)
    logprob_R = torch.zeros(requests, dtype=torch.float64)
    for batch, own in own_batches(forward, batches):
        tokens_BS, _ = padded(batch, forward.multiple)
        labels_BS = torch.zeros_like(tokens_BS)
        for row, labels_S in zip(batch, labels_BS, strict=True):
            (part,) = row.scored
            labels_S[part.first : len(part.tokens)] = torch.tensor(part.targets)
        loss_BS = forward.losses(tokens_BS, labels_BS).double().cpu()
        for row, loss_S in zip(batch if own else [], loss_BS, strict=False):
            (part,) = row.scored
            logprob_R[part.request] -= loss_S[part.first : len(part.tokens)].sum()
        report(progress, batch, forward)
    logprob_R = over_replicas(forward, logprob_R)
    check_finite(logprob_R)
    logprobs: list[float] = logprob_R.tolist()
    return logprobs


def own_batches(forward: Forward, batches: Sequence[list[Row]]) -> list[tuple[list[Row], bool]]:
    """The batches that this process runs, and whether their results count. Every process runs as many: where experts are divided, a forward of one
    process needs the others."""
    group = forward.replicas
    rounds = range(0, len(batches), group.size)
    return [(batches[min(begin + group.rank, len(batches) - 1)], begin + group.rank < len(batches)) for begin in rounds]


def padded(batch: Sequence[Row], multiple: int) -> tuple[Tensor, Tensor]:
    """(tokens_BS, chosen_BS): the rows with zeros after them, and the positions whose logits are needed. Nothing before the padding sees it."""
    longest = max(len(row.tokens) for row in batch)
    length = -(-longest // multiple) * multiple
    tokens_BS = torch.zeros(len(batch), length, dtype=torch.int64)
    chosen_BS = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, tokens_S, chosen_S in zip(batch, tokens_BS, chosen_BS, strict=True):
        tokens_S[: len(row.tokens)] = torch.tensor(row.tokens)
        chosen_S[row.first : len(row.tokens)] = True
    return tokens_BS, chosen_BS


def read_logits(logits_NV: Tensor, batch: Sequence[Row], chosen_BS: Tensor) -> list[tuple[Scored, tuple[float, int]]]:
    """(log p, number of tokens that are not the most likely ones) of every part of the batch."""
    logits_NV = logits_NV.float()
    total_N, best_N = logits_NV.logsumexp(-1), logits_NV.argmax(-1)
    parts: list[Scored] = []
    places: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    begin = 0
    for row, count in zip(batch, chosen_BS.sum(-1).tolist(), strict=True):
        for part in row.scored:
            parts.append(part)
            counts.append(len(part.targets))
            places += range(begin + part.first - row.first, begin + part.first - row.first + len(part.targets))
            targets += part.targets
        begin += count
    place_P = torch.tensor(places, device=logits_NV.device)
    target_P = torch.tensor(targets, device=logits_NV.device)
    logprob_P = (logits_NV[place_P, target_P] - total_N[place_P]).double().cpu()
    miss_P = (best_N[place_P] != target_P).cpu()
    sums = (float(piece.sum()) for piece in logprob_P.split(counts))
    misses = (int(piece.sum()) for piece in miss_P.split(counts))
    return list(zip(parts, zip(sums, misses, strict=True), strict=True))


def over_replicas(forward: Forward, tensor_R: Tensor) -> Tensor:
    """The sum over the processes that shared the rows, on the CPU."""
    group = forward.replicas
    if group.size == 1:
        return tensor_R
    on_device = tensor_R.cuda() if torch.distributed.get_backend(group.handle) == "nccl" else tensor_R
    return group.sum(on_device).cpu()


def report(progress: Progress, batch: Sequence[Row], forward: Forward) -> None:
    """The other processes are about as far as this one."""
    done = forward.replicas.size
    progress(done * sum(len(row.scored) for row in batch), done * sum(len(row.tokens) for row in batch))


def check_finite(logprob_R: Tensor) -> None:
    """Raises InferenceError."""
    if not bool(logprob_R.isfinite().all()):
        raise InferenceError("The model gives log-likelihoods that are NaN or infinite: its training diverged, or its number format is too small.")
