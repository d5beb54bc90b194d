"""Both ends of the model: tokens to hidden states, and hidden states to logits or straight to the loss.

Shapes: B batch; S sequence; D model width; V padded vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from megatron.kernels.linear_cross_entropy import linear_cross_entropy
from megatron.kernels.precision import linear
from megatron.model.initialization import Initializer
from megatron.model.positions import START, Places
from megatron.model.positions.learned import LearnedPositions
from megatron.model.positions.sinusoidal import SinusoidalPositions

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


class Embedding(nn.Module):
    """Word embeddings."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, init: Initializer) -> None:
        super().__init__()
        self.word_embeddings = _table(padded_vocab_size, model.hidden_size, init)
        self.dropout = nn.Dropout(model.hidden_dropout)

    def forward(self, tokens_BS: Tensor, places: Places = START) -> Tensor:
        """hidden_BSD."""
        return self.dropout(self.word_embeddings(tokens_BS))


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
        words_BSD = self.word_embeddings(tokens_BS)
        return self.dropout(words_BSD + self.position_embeddings(places, tokens_BS.shape[1]).to(words_BSD.dtype))


def build_embedding(model: ModelConfig, padded_vocab_size: int, init: Initializer) -> Embedding:
    """The embedding that the model section describes."""
    return (PositionedEmbedding if model.pos_emb in ("learned", "sinusoidal") else Embedding)(model, padded_vocab_size, init)


class Head(nn.Module):
    """An output projection with a weight of its own. With targets it gives the loss without ever holding all logits."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, init: Initializer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(padded_vocab_size, model.hidden_size))
        init.into(self.weight.data)

    def forward(self, hidden_BSD: Tensor, targets: Targets | None = None) -> tuple[Tensor, ...]:
        """(logits_BSV,) in the model's dtype, or with targets (mean loss, token_loss_BS)."""
        return project(hidden_BSD, self.weight, targets)


class FinalLinear(nn.Module):
    """The untied head under NeoX's name."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, init: Initializer) -> None:
        super().__init__()
        self.final_linear = Head(model, padded_vocab_size, init)

    def forward(self, hidden_BSD: Tensor, targets: Targets | None = None) -> tuple[Tensor, ...]:
        """As `Head`."""
        return self.final_linear(hidden_BSD, targets)


def project(hidden_BSD: Tensor, weight_VD: Tensor, targets: Targets | None) -> tuple[Tensor, ...]:
    """(logits_BSV,), or with targets (mean loss, token_loss_BS): what a head does with its own or a tied weight."""
    if targets is None:
        return (linear(hidden_BSD, weight_VD),)
    mask_BS, total = targets.loss_mask or (None, None)
    mask_T = None if mask_BS is None else mask_BS.reshape(-1)
    labels_T, backend = targets.labels_BS.reshape(-1), targets.backend
    loss, token_loss_T = linear_cross_entropy(hidden_BSD.flatten(0, 1), weight_VD, labels_T, mask_T, total=total, backend=backend)
    return loss, token_loss_T.view(targets.labels_BS.shape)


def _table(entries: int, width: int, init: Initializer) -> nn.Embedding:
    """An embedding drawn by `init` alone."""
    weight = torch.empty(entries, width)
    init.into(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)
