"""How a model computes for the harness: alone in eval.py, or as a part of a training run.

Shapes: B rows; S positions; N chosen positions; V padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.inference.model import ReadyModel
from megatron.mpu.groups import ALONE, Group, current_groups


class Forward(Protocol):
    """Runs one model. The processes that have parts of it call each method together, with the same tokens."""

    @property
    def replicas(self) -> Group:
        """The processes that share the rows of one evaluation, each with a model of its own or with its part of the experts."""

    @property
    def independent(self) -> bool:
        """Whether each of `replicas` can run without the others, so that they may generate different texts."""

    @property
    def multiple(self) -> int:
        """The number of positions must be a multiple of this."""

    def logits(self, tokens_BS: Tensor, chosen_BS: Tensor) -> Tensor:
        """logits_NV, on every process."""

    def losses(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """loss_BS: -log p of each label, float32, on every process."""


@dataclass
class ReadyForward:
    """A model that is loaded for inference. `replicas`: other processes have the whole model too and share the work."""

    ready: ReadyModel
    replicas: Group = ALONE
    independent: bool = True
    multiple: int = 1

    @torch.inference_mode()
    def logits(self, tokens_BS: Tensor, chosen_BS: Tensor) -> Tensor:
        """See Forward."""
        device = self.ready.device
        return self.ready.gpt.chosen_logits(tokens_BS.to(device), chosen_BS.to(device))

    @torch.inference_mode()
    def losses(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """See Forward."""
        device = self.ready.device
        loss_BS = self.ready.gpt(tokens_BS.to(device), labels_BS=labels_BS.to(device)).token_loss_BS.float()
        return current_groups().pipe.sum(loss_BS)  # the stages before the last have zeros
