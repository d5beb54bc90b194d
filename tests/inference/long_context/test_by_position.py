"""Loss by context length, against the loss of each position by its definition."""

from __future__ import annotations

import pytest
import torch

from megatron.inference.errors import InferenceError
from megatron.inference.long_context.by_position import losses_by_position, summed
from megatron.inference.model import ReadyModel

TEXT = "The state of the Union is strong, and the people are free. " * 3


def test_each_range_has_the_losses_of_its_positions(ready: ReadyModel) -> None:
    counted: list[int] = []
    rows = losses_by_position(ready, "a.txt", TEXT, ranges=4, progress=lambda done, total: counted.append(done))
    assert [(row.first, row.last) for row in rows] == [(1, 4), (5, 8), (9, 16), (17, 32)]
    tokens = [ready.tokenizer.eod, *ready.tokenizer.encode(TEXT)]
    windows = (len(tokens) - 1) // 32
    expected = torch.empty(windows, 32, dtype=torch.float64)
    for number in range(windows):
        part = tokens[32 * number : 32 * number + 33]
        logits_SV = ready.gpt(torch.tensor([part[:-1]])).logits_BSV[0].double()
        expected[number] = torch.nn.functional.cross_entropy(logits_SV, torch.tensor(part[1:]), reduction="none")
    for row in rows:
        assert row.loss == pytest.approx(float(expected[:, row.first - 1 : row.last].mean()), rel=1e-4)
        assert row.tokens == windows * (row.last - row.first + 1)
    assert sum(counted) == windows * 32


def test_ranges_cover_a_window_of_any_length() -> None:
    rows = summed(torch.arange(21.0).view(1, 21).double(), 3)
    assert [(row.first, row.last, row.loss) for row in rows] == [(1, 5, 2.0), (6, 10, 7.0), (11, 21, 15.0)]


def test_texts_and_ranges_that_cannot_be(ready: ReadyModel) -> None:
    with pytest.raises(InferenceError, match=r"eval_position_ranges = 7: a window of 32 tokens \(seq_length\) has at most 6 ranges"):
        losses_by_position(ready, "a.txt", TEXT, ranges=7, progress=lambda done, total: None)
    with pytest.raises(InferenceError, match=r"a\.txt has 5 tokens and a window 32 \(seq_length\): give a longer text"):
        losses_by_position(ready, "a.txt", "short", ranges=2, progress=lambda done, total: None)
