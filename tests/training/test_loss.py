"""What is predicted and what counts, against NeoX's rules written out token by token."""

from __future__ import annotations

import torch

from megatron.training.loss import next_token_targets

EOD = 9
TEXT = torch.tensor([[1, 2, EOD, 3, 4, 5], [EOD, EOD, 6, 7, 0, 0]])
LABEL = torch.tensor([[-100, 2, EOD, -100, 4, 5], [-1, EOD, 6, 7, 0, -100]])


def test_without_labels_every_next_token_counts() -> None:
    tokens, labels, mask = next_token_targets(TEXT)
    assert (tokens.tolist(), labels.tolist(), mask) == (TEXT[:, :-1].tolist(), TEXT[:, 1:].tolist(), None)


def test_masking_the_end_of_documents_leaves_out_what_follows_it() -> None:
    mask = next_token_targets(TEXT, masked_token=EOD).loss_mask_BS
    assert mask is not None
    assert (mask.tolist(), mask.dtype) == ([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]], torch.float32)


def test_labels_are_the_targets_and_negative_ones_do_not_count() -> None:
    tokens, labels, mask = next_token_targets(TEXT, LABEL)
    assert tokens.tolist() == TEXT[:, :-1].tolist()
    assert labels.tolist() == [[2, EOD, 0, 4, 5], [EOD, 6, 7, 0, 0]]
    assert mask is not None
    assert mask.tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]], "token 0 is a token"


def test_both_masks_together() -> None:
    mask = next_token_targets(TEXT, LABEL, masked_token=EOD).loss_mask_BS
    assert mask is not None
    assert mask.tolist() == [[1, 1, 0, 1, 1], [0, 0, 1, 1, 0]]
    assert all(part.is_contiguous() for part in next_token_targets(TEXT, LABEL, masked_token=EOD) if part is not None)
