"""Requests as rows of tokens: cutting, sharing, batches."""

from __future__ import annotations

from megatron.inference.harness.requests import batches_of, cut, rows_of


def parts_of(*pairs: tuple[list[int], list[int]], window: int = 100):  # type: ignore[no-untyped-def]
    return [part for number, (context, continuation) in enumerate(pairs) for part in cut(number, context, continuation, window)]


def test_a_continuation_is_predicted_from_the_tokens_before_it() -> None:
    (part,) = cut(0, [1, 2, 3], [4, 5], 100)
    assert part.tokens == (1, 2, 3, 4)
    assert part.targets == (4, 5)
    assert part.first == 2  # position 2 holds token 3, which predicts 4


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    (part,) = cut(0, [1, 2, 3, 4, 5], [6, 7], 4)
    assert part.tokens == (3, 4, 5, 6)
    (part,) = cut(0, [1, 2], [3, 4, 5], 4)
    assert part.tokens == (1, 2, 3, 4), "a window of 4 predicts 3 tokens with 2 before them"


def test_a_continuation_longer_than_the_window_is_cut_and_every_token_counts_once() -> None:
    parts = list(cut(7, [1], [2, 3, 4, 5, 6], 2))
    assert [part.targets for part in parts] == [(2, 3), (4, 5), (6,)]
    assert [part.tokens for part in parts] == [(1, 2), (3, 4), (4, 5)]
    assert {part.request for part in parts} == {7}
    assert all(part.first >= 0 for part in parts)


def test_rows_that_begin_alike_are_one() -> None:
    parts = parts_of(([1, 2], [3]), ([1, 2], [4]), ([1, 2], [3, 5]), ([9], [8]))
    rows = rows_of(parts)
    assert [row.tokens for row in rows] == [(1, 2, 3), (9,)]
    assert sorted(part.request for part in rows[0].scored) == [0, 1, 2]
    assert rows[0].first == 1
    assert [len(row.scored) for row in rows_of(parts, merge=False)] == [1, 1, 1, 1]


def test_a_row_that_only_shares_its_beginning_stays_alone() -> None:
    assert len(rows_of(parts_of(([1, 2, 3], [4, 5]), ([1, 2, 9], [4, 5])))) == 2


def test_batches_keep_to_their_tokens_with_padding() -> None:
    rows = rows_of(parts_of(*(([n] * length, [1]) for n, length in enumerate([10, 4, 4, 3, 25]))))
    batches = batches_of(rows, 20)
    assert [[len(row.tokens) for row in batch] for batch in batches] == [[25], [10, 4], [4, 3]]
    assert [len(batch) for batch in batches_of(rows, 0)] == [1, 1, 1, 1, 1]
