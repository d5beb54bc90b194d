"""Every measure equals a value worked out by hand on a trace of a few tokens."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from megatron.analysis.routing.blocks import Block, Shape, Viewer, evenness
from megatron.analysis.routing.co_activation import CoActivationCount, lifts
from megatron.analysis.routing.findings import PERCENTILES
from megatron.analysis.routing.load import LoadCount
from megatron.analysis.routing.lores import LoreCount, coverage
from megatron.analysis.routing.overload import OverloadCount, overload, sizes
from megatron.analysis.routing.repeats import RepeatCount, random_overlap
from megatron.analysis.routing.samples import SampleKeeper
from megatron.analysis.routing.saturation import Kept, in_order, saturation
from megatron.analysis.routing.specialisation import LEAST, TokenCount, wilson_lower
from tests.analysis.routing.conftest import block, shape, view

TOKENS = [[0, 1], [0, 2], [1, 0], [3, 1]]


def test_load_by_hand() -> None:
    size = shape(domains=("one", "two"))
    count = LoadCount(size)
    count.add(view(TOKENS, size))
    count.add(view([[2, 3], [2, -1]], size, domain=1))
    found = count.found()
    assert found.choice_GLKE[0, 0].tolist() == [[2, 1, 0, 1], [1, 2, 1, 0]]
    assert found.first_GLE[0, 0].tolist() == [0.5, 0.25, 0, 0.25]
    assert found.second_GLE[0, 0].tolist() == [0.25, 0.5, 0.25, 0]
    assert found.either_GLE[0, 0].tolist() == [3 / 8, 3 / 8, 1 / 8, 1 / 8]
    assert found.either_GLE[1, 0].tolist() == pytest.approx([0, 0, 2 / 3, 1 / 3])
    assert found.choice_GLKE[2, 0].sum(0).tolist() == [3, 3, 3, 2]  # both domains together
    assert found.even_L.tolist() == [0.25]
    assert found.delta_uniform_GL[0, 0] == pytest.approx(1 / 8)
    assert found.entropy_GL[0, 0] == pytest.approx(-(6 / 8 * math.log(3 / 8) + 2 / 8 * math.log(1 / 8)) / math.log(4))
    assert found.percentiles_GLP[0, 0, [0, -1]].tolist() == [0.5, 1.5]
    assert found.percentiles_GP[0, PERCENTILES.index(50)] == 1.0
    assert found.dead_GL.tolist() == [[0], [2], [0]]
    assert count.tokens_D.tolist() == [4, 2]


def test_layers_with_other_numbers_of_experts() -> None:
    size = Shape([3, 7], [4, 2], 1, ["one"])
    count = LoadCount(size)
    count.add(Viewer(size, 3).view(Block(0, np.array([[[3], [0]], [[3], [0]]]))))
    found = count.found()
    assert found.either_GLE[0, 0].tolist() == [0, 0, 0, 1]
    assert found.either_GLE[0, 1, :2].tolist() == [1, 0]
    assert np.isnan(found.either_GLE[0, 1, 2:]).all()
    assert found.delta_uniform_GL[0].tolist() == [0.375, 0.5]
    assert found.dead_GL[0].tolist() == [3, 1]
    assert np.isnan(found.second_GLE).all()


def test_weights_are_averaged_where_there_is_an_expert() -> None:
    size = shape()
    count = LoadCount(size)
    weights = np.array([[[0.75, 0.25]], [[0.5, 0.0]]], np.float32)
    count.add(Viewer(size, 3).view(Block(0, np.array([[[0, 1]], [[2, -1]]]), weights)))
    assert count.found().weight_LK.tolist() == [[0.625, 0.25]]


def test_repeats_by_hand() -> None:
    size = shape()
    count = RepeatCount(size)
    count.add(view(TOKENS, size))
    found = count.found(count.used_per_token_L)
    assert found.pairs_G.tolist() == [3]
    assert found.first_GL[0, 0] == pytest.approx(1 / 3)  # 0 0 | 0 1 | 1 3
    assert found.first_or_second_GL[0, 0] == pytest.approx(3 / 3)  # 0; 0; 1
    assert found.any_GL[0, 0] == found.first_or_second_GL[0, 0]
    assert found.exrep_GL[0, 0] == pytest.approx(3 / 6)  # 2; 1; 3
    assert found.random_exrep_L.tolist() == [0.5]


def test_a_text_that_comes_in_blocks_counts_as_one() -> None:
    rng = np.random.default_rng(3)
    tokens = np.array([rng.choice(8, 3, replace=False) for _ in range(200)])
    size = shape(8, 3)
    whole, parts, viewer = RepeatCount(size), RepeatCount(size), Viewer(size, 3)
    whole.add(view(tokens.tolist(), size))
    for begin in range(0, 200, 7):
        parts.add(viewer.view(block(tokens[begin : begin + 7].tolist(), continues=begin > 0)))
    one, other = whole.found(whole.used_per_token_L), parts.found(parts.used_per_token_L)
    for name in ("pairs_G", "first_GL", "first_or_second_GL", "any_GL", "exrep_GL"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    apart, viewer = RepeatCount(size), Viewer(size, 3)
    for begin in range(0, 200, 10):
        apart.add(viewer.view(block(tokens[begin : begin + 10].tolist())))
    assert apart.found(apart.used_per_token_L).pairs_G.tolist() == [180]  # texts do not follow each other


def test_a_blank_choice_repeats_nothing() -> None:
    size = shape()
    count = RepeatCount(size)
    count.add(view([[-1, -1], [-1, -1], [0, -1]], size))
    found = count.found(count.used_per_token_L)
    assert (found.first_GL[0, 0], found.any_GL[0, 0], found.exrep_GL[0, 0]) == (0, 0, 1)


def test_the_random_lines_of_mixtrals_table_5() -> None:
    assert random_overlap(8, 1) == 0.125
    assert random_overlap(8, 2) == pytest.approx(1 - 6 / 8 * 5 / 7)
    assert random_overlap(4, 3) == 1.0
    assert random_overlap(8, 1.5) == pytest.approx((random_overlap(8, 1) + random_overlap(8, 2)) / 2)


def test_co_activation_by_hand() -> None:
    size = shape()
    count = CoActivationCount(size)
    count.add(view(TOKENS, size))
    found = count.found(np.array([2.0]))
    assert found is not None
    assert found.shown_LH.tolist() == [[0, 1, 2, 3]]
    assert np.nan_to_num(found.share_LHH[0], nan=-1).tolist()[0] == pytest.approx([-1, 2 / 3, 1 / 3, 0])
    assert found.share_LHH[0, 3, 1] == 1.0
    assert found.random_L.tolist() == pytest.approx([1 / 3])
    assert found.pairs == []  # four tokens are no proof
    assert CoActivationCount(shape(top_k=1)).found(np.array([1.0])) is None


def test_pairs_that_are_together_above_chance() -> None:
    size = shape()
    count = CoActivationCount(size)
    count.add(view([[0, 1], [2, 3]] * 200, size))
    found = count.found(np.array([2.0]))
    assert found is not None
    assert [(pair.first, pair.second, pair.tokens) for pair in found.pairs] == [(0, 1, 200), (2, 3, 200)]
    assert found.pairs[0].lift == pytest.approx(3.0)  # one of six pairs would be two thirds of them less often
    even = np.full((4, 4), 10) + np.diag([20] * 4)
    assert np.nan_to_num(lifts(even), nan=0)[0].tolist() == pytest.approx([0, 1, 1, 1])


def test_overload_by_hand() -> None:
    assert overload(np.array([4, 2, 1, 1]), 2) == 6 / 4
    assert overload(np.array([4, 2, 1, 1]), 4) == 2.0
    assert math.isnan(overload(np.array([4, 2, 1]), 2))
    assert sizes(shape(8)) == [2, 4, 8]
    size = shape()
    count = OverloadCount(size, [2], batch_tokens=2)
    count.add(view([[0, 1], [0, 2]], size))
    count.add(view([[1, 0], [3, 1]], size))
    found = count.found()
    assert found.mean_LR.tolist() == [[1.5]]
    assert found.worst_LR.tolist() == [[1.5]]
    assert found.whole_LR.tolist() == [[1.5]]
    count.add(view([[2, 3], [2, 3]], size))
    assert count.found().mean_LR[0, 0] == pytest.approx((1.5 + 1.5 + 2) / 3)
    assert count.found().worst_LR[0, 0] == 2.0


def test_lores_by_hand() -> None:
    size = shape(2, 1, lores=(3, 2))
    count = LoreCount(size)
    count.add(view([[0], [0], [1], [0]], size, lores=[[[0, 1]], [[1, 0]], [[2, 1]], [[2, 0]]]))
    found = count.found()
    assert found.count_GLEM[0, 0].tolist() == [[3, 2, 1], [0, 1, 1]]
    assert found.dead_GLE[0, 0].tolist() == [0, 1]
    assert found.random_dead_GLE[0, 0].tolist() == pytest.approx([3 * (1 / 3) ** 3, 3 * (1 / 3)])
    shares = np.array([3, 2, 1]) / 6
    assert found.entropy_GLE[0, 0, 0] == pytest.approx(-(shares * np.log(shares)).sum() / math.log(3))
    assert found.delta_uniform_GLE[0, 0].tolist() == pytest.approx([(1 / 6 + 1 / 6) / 3, (1 / 3 + 1 / 6 + 1 / 6) / 3])
    assert found.coverage_GLE[0, 0].tolist() == pytest.approx([1.0, 2 / 3])
    assert found.together_LEMM is not None
    assert np.nan_to_num(found.together_LEMM[0, 0], nan=-1).tolist()[0] == pytest.approx([-1, 2 / 3, 1 / 3])
    assert found.repeat_GL.tolist() == [[1.0]]  # tokens 0 and 1; the others change the expert
    assert found.random_together == 0.5
    assert found.random_repeat == 1.0


def test_lores_of_an_expert_without_rows() -> None:
    size = shape(2, 1, lores=(3, 1))
    count = LoreCount(size)
    count.add(view([[0], [0]], size, lores=[[[0]], [[1]]]))
    found = count.found()
    assert found.dead_GLE[0, 0].tolist() == [1, 0]
    assert np.isnan(found.entropy_GLE[0, 0, 1])
    assert np.isnan(found.coverage_GLE[0, 0, 1])
    assert found.together_LEMM is None
    assert found.repeat_GL.tolist() == [[0.0]]


def test_coverage() -> None:
    assert coverage(np.array([90, 5, 5])) == pytest.approx(1 / 3)
    assert coverage(np.full(10, 7)) == pytest.approx(0.9)
    assert math.isnan(float(coverage(np.zeros(3, np.int64))))


def test_evenness() -> None:
    assert evenness(np.array([0.25] * 4), np.array(4)) == pytest.approx(1)
    assert evenness(np.array([1.0, 0, 0, 0]), np.array(4)) == 0
    assert math.isnan(float(evenness(np.full(4, np.nan), np.array(4))))


def test_wilson_is_the_root_of_its_definition() -> None:
    count, total, z = 7, 30, 2.5
    share = count / total
    a, b, c = 1 + z * z / total, -(2 * share + z * z / total), share * share  # (p - share)^2 = z^2 p (1 - p) / total
    expected = (-b - math.sqrt(b * b - 4 * a * c)) / (2 * a)
    assert float(wilson_lower(np.array(count), np.array(total), z)) == pytest.approx(expected)


def test_an_experts_tokens() -> None:
    size = shape(4, 1, domains=("one", "two"))
    tokens = np.array([7, 8, 9, 9] * 100)
    experts = np.where(tokens == 7, 3, np.arange(400) % 2)[:, None, None]
    count, load, occurrences = TokenCount(size, Counter(tokens.tolist())), LoadCount(size), Counter(tokens.tolist())
    seen = Viewer(size, 3).view(Block(0, experts, None, tokens))
    count.add(seen)
    load.add(seen)
    found = count.found(load.found(), size.over_groups(load.tokens_D), {7: "seven"})
    assert found.domain_GLE[0, 0].tolist() == [0.25, 0.5, 0, 0.25]
    assert np.isnan(found.domain_GLE[1]).all()
    assert found.domain_distance_GL[0].tolist() == [0.0]
    best = next(entry for entry in found.tokens if entry.expert == 3).tokens[0]
    assert (best.token, best.piece, best.count, best.total, best.share, best.lift) == (7, "seven", 100, 100, 1.0, 4.0)
    assert 1 < best.lower < 4
    assert found.vocabulary_size == 3
    # 7 always goes to 3, 8 always to 1, and 9, which is half of the text, in turns to 0 and 1
    assert found.vocabulary_L[0] == pytest.approx(0.75, abs=0.06)
    assert found.vocabulary_even_L.tolist() == [0.5]
    after = next(entry for entry in found.predicted if entry.expert == 3).tokens[0]
    assert (after.token, after.count, after.total) == (8, 100, 100)
    assert occurrences[7] == 100


def test_a_rare_token_does_not_win() -> None:
    size = shape(4, 1)
    tokens = np.array([5] * (LEAST - 1) + [6] * 200)
    experts = np.where(tokens == 5, 3, np.arange(len(tokens)) % 4)[:, None, None]
    count, load = TokenCount(size, Counter(tokens.tolist())), LoadCount(size)
    seen = Viewer(size, 3).view(Block(0, experts, None, tokens))
    count.add(seen)
    load.add(seen)
    found = count.found(load.found(), load.tokens_D, {})
    assert found.vocabulary_size == 1
    assert not any(entry.tokens for entry in found.tokens)


def test_samples() -> None:
    size = shape(domains=("one", "two"))
    keeper = SampleKeeper(size)
    viewer = Viewer(size, 3)
    keeper.add(viewer.view(Block(0, np.array([[[0, 1]], [[2, 3]]]), np.ones((2, 1, 2), np.float32), np.array([1, 2]))))
    keeper.add(viewer.view(Block(0, np.array([[[1, 0]]] * 500), np.ones((500, 1, 2), np.float32), np.full(500, 3))))
    (sample,) = keeper.found({1: "a", 2: "b"})
    assert sample.domain == "one"
    assert sample.pieces[:3] == ["a", "b", "3"]
    assert sample.expert_NLK.shape == (keeper.length, 1, 2)
    assert sample.starts == [0, 2]


def test_saturation_by_hand() -> None:
    def kept(name: str, experts: list[list[int]], iteration: int | None) -> Kept:
        return Kept(name, iteration, [0], [4], np.array([5, 6]), np.array(experts)[:, None])

    first, last = kept("a", [[0, 1], [2, 3]], 100), kept("b", [[1, 0], [0, 3]], 200)
    found = saturation(in_order([last, first]))
    assert found is not None
    assert not isinstance(found, str)
    assert (found.names, found.iterations, found.tokens) == (["a", "b"], [100, 200], 2)
    assert found.share_SL.tolist() == [[0.75], [1.0]]
    assert found.first_SL.tolist() == [[0.0], [1.0]]
    assert found.random_L.tolist() == [0.5]
    assert saturation([first]) is None
    other = Kept("c", None, [0], [4], np.array([5, 9]), first.expert_NLK)
    assert saturation([first, other]) == "Saturation is left out: a and c did not read the same tokens."
    other = Kept("c", None, [0], [8], np.array([5, 6]), first.expert_NLK)
    assert saturation([first, other]) == "Saturation is left out: a and c do not have the same layers and experts."
