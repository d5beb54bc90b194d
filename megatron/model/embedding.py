"""Both ends of the model: tokens to hidden states, and hidden states to logits or straight to the loss.

Shapes: B batch; S sequence; D model width; V padded vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from megatron.kernels.linear_cross_entropy import linear_cross_entropy, token_weights
from megatron.kernels.precision import linear
from megatron.model.initialization import Initializer
from megatron.model.positions import START, Places
from megatron.model.positions.learned import LearnedPositions
from megatron.model.positions.sinusoidal import SinusoidalPositions
from megatron.mpu.cross_entropy import joined_logits, vocab_parallel_cross_entropy
from megatron.mpu.random import SharedDropout
from megatron.mpu.regions import WHOLE, Region

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig


class LossMask(NamedTuple):
    """The weight of each token's loss in the mean."""

    mask_BS: Tensor
    total: Tensor | None = None
    """sum(mask * loss) is divided by this number, if the mean is over more than this micro-batch. None: by sum(mask)."""


class Targets(NamedTuple):
    """The tokens that the model should predict."""

    labels_BS: Tensor
    """int64: the token after each token."""
    loss_mask: LossMask | None
    """None: all tokens count the same."""
    backend: str = "auto"
    """The implementation of the loss."""


class VocabShare(NamedTuple):
    """The rows of the vocabulary that this process has."""

    region: Region = WHOLE
    rows: range = range(0)
    """Empty where there is one process."""
    vocabulary: int = 0
    """Rows in all."""

    @property
    def is_shared(self) -> bool:
        """Whether other processes have other rows."""
        return self.region.group.size > 1


ALL_ROWS = VocabShare()


class Embedding(nn.Module):
    """Word embeddings."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, init: Initializer) -> None:
        super().__init__()
        self.word_embeddings = _table(padded_vocab_size, model.hidden_size, init)
        self.dropout = SharedDropout(model.hidden_dropout)
        self.share = ALL_ROWS

    def forward(self, tokens_BS: Tensor, places: Places = START) -> Tensor:
        """hidden_BSD; with sequence parallelism this process's part of the sequence."""
        return self.dropout(self.words(tokens_BS))

    def words(self, tokens_BS: Tensor) -> Tensor:
        """The words' embeddings. A process looks up the rows that it has; the sum over the processes is whole."""
        if not self.share.is_shared:
            return self.word_embeddings(tokens_BS)
        own_BS = (tokens_BS >= self.share.rows.start) & (tokens_BS < self.share.rows.stop)
        row_BS = torch.where(own_BS, tokens_BS - self.share.rows.start, 0)
        return self.share.region.leave(self.word_embeddings(row_BS) * own_BS[..., None])


class PositionedEmbedding(Embedding):
    """Word embeddings plus position embeddings, learned or sinusoidal."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, init: Initializer) -> None:
        super().__init__(model, padded_vocab_size, init)
        self.position_embeddings: LearnedPositions | SinusoidalPositions
        if model.pos_emb == "learned":
            self.position_embeddings = LearnedPositions(model.max_position_embeddings, model.hidden_size, model.opt_pos_emb_offset, init.into)
        else:
            self.position_embeddings = SinusoidalPositions(model.hidden_size)

    def forward(self, tokens_BS: Tensor, places: Places = START) -> Tensor:
        """hidden_BSD."""
        words_BSD, region = self.words(tokens_BS), self.share.region
        positions = self.position_embeddings(places, tokens_BS.shape[1]).to(words_BSD.dtype)
        if region.sequence:  # the table's gradient is summed over the processes
            positions = positions.chunk(region.group.size, -2)[region.group.rank]
        return self.dropout(words_BSD + positions)


def build_embedding(model: ModelConfig, padded_vocab_size: int, init: Initializer) -> Embedding:
    """The embedding that the model section describes."""
    return (PositionedEmbedding if model.pos_emb in ("learned", "sinusoidal") else Embedding)(model, padded_vocab_size, init)


class Head(nn.Module):
    """An output projection with a weight of its own. With targets it gives the loss without ever holding all logits."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, init: Initializer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(padded_vocab_size, model.hidden_size))
        init.into(self.weight.data)
        self.share = ALL_ROWS

    def forward(self, hidden_BSD: Tensor, targets: Targets | None = None) -> tuple[Tensor, ...]:
        """(logits_BSV,) in the model's dtype, or with targets (mean loss, token_loss_BS)."""
        return project(hidden_BSD, self.weight, targets, self.share)


class FinalLinear(nn.Module):
    """The untied head under NeoX's name."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, init: Initializer) -> None:
        super().__init__()
        self.final_linear = Head(model, padded_vocab_size, init)

    def forward(self, hidden_BSD: Tensor, targets: Targets | None = None) -> tuple[Tensor, ...]:
        """As `Head`."""
        return self.final_linear(hidden_BSD, targets)


def project(hidden_BSD: Tensor, weight_VD: Tensor, targets: Targets | None, share: VocabShare = ALL_ROWS) -> tuple[Tensor, ...]:
    """(logits_BSV,), or with targets (mean loss, token_loss_BS): what a head does with its own or a tied weight.

    Where processes share the vocabulary, each of them gets the whole result.
    """
    hidden_BSD = share.region.enter(hidden_BSD)
    if targets is None:
        return (joined_logits(linear(hidden_BSD, weight_VD), share.region.group, share.vocabulary),)
    mask_BS, total = targets.loss_mask or (None, None)
    mask_T = None if mask_BS is None else mask_BS.reshape(-1)
    labels_T, backend = targets.labels_BS.reshape(-1), targets.backend
    hidden_TD = hidden_BSD.flatten(0, 1)
    if share.is_shared:
        scale_T = token_weights(labels_T, mask_T, total, hidden_TD.dtype)
        loss, token_loss_T = vocab_parallel_cross_entropy(hidden_TD, weight_VD, labels_T - share.rows.start, scale_T, share.region.group)
    else:
        loss, token_loss_T = linear_cross_entropy(hidden_TD, weight_VD, labels_T, mask_T, total=total, backend=backend)
    return loss, token_loss_T.view(targets.labels_BS.shape)


def _table(entries: int, width: int, init: Initializer) -> nn.Embedding:
    """An embedding drawn by `init` alone."""
    weight = torch.empty(entries, width)
    init.into(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)
