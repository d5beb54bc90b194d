"""Which part of a weight a process holds."""

from __future__ import annotations

import torch

from megatron.model.division import Cut, Span, whole_cut


def test_a_cut_takes_its_spans_of_every_dimension() -> None:
    whole = torch.arange(24).view(6, 4)
    cut = Cut((6, 4), ((Span(0, 1), Span(3, 5, owned=False)), (Span(2, 4),)))
    assert cut.local_shape == (3, 2)
    assert not cut.is_whole
    assert cut.take(whole).tolist() == [[2, 3], [14, 15], [18, 19]]
    boxes = list(cut.boxes())
    assert [box.owned for box in boxes] == [True, False]
    rebuilt = torch.zeros_like(whole)
    for box in boxes:
        rebuilt[box.whole] = cut.take(whole)[box.local]
    assert rebuilt.nonzero().shape[0] == 6


def test_a_whole_cut_copies_nothing() -> None:
    whole = torch.ones(2, 3)
    assert whole_cut((2, 3)).take(whole) is whole
    assert [box.owned for box in whole_cut((2, 3), owned=False).boxes()] == [False]
