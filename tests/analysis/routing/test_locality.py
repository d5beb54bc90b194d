"""SRP and SCH against brute force, text that comes in blocks against the whole, and a random router against the random lines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron.analysis.routing.blocks import Viewer
from megatron.analysis.routing.example import example, random_trace
from megatron.analysis.routing.from_trace import blocks_of, shape_of
from megatron.analysis.routing.locality import LocalityCount, locality
from megatron.analysis.routing.repeats import RepeatCount
from megatron.monitor.routing_trace import Trace
from tests.analysis.routing.conftest import block, shape


def brute_sch(tokens: list[set[int]], length: int, slots: int, experts: int) -> float:
    """Over all windows: the best set of so many experts for each, found by trying every one."""
    hits = total = 0
    for begin in range(len(tokens) - length + 1):
        window = tokens[begin : begin + length]
        hits += max(sum(len(token & set(chosen)) for token in window) for chosen in itertools.combinations(range(experts), slots))
        total += sum(map(len, window))
    return hits / total


def brute_srp(tokens: list[set[int]], length: int, experts: int) -> float:
    """The best F1 over every choice of one set (of any size) for each window: a router that gives each token of the window this set."""
    windows = [tokens[begin : begin + length] for begin in range(len(tokens) - length + 1)]
    sets = [set(chosen) for size in range(experts + 1) for chosen in itertools.combinations(range(experts), size)]
    truth = sum(len(token) for window in windows for token in window)
    best = 0.0
    for chosen in itertools.product(sets, repeat=len(windows)):
        hits = sum(len(token & own) for window, own in zip(windows, chosen, strict=True) for token in window)
        given = sum(length * len(own) for own in chosen)
        best = max(best, 2 * hits / (given + truth))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_srp_and_sch_agree_with_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = [rng.choice(4, 2, replace=False).tolist() for _ in range(4)]
    size = shape()
    count = LocalityCount(size, [2], [1, 2, 3])
    count.add(Viewer(size, 1).view(block(tokens)))
    found = count.found()
    sets = [set(token) for token in tokens]
    assert found.sch_GLWC[0, 0, 0].tolist() == pytest.approx([brute_sch(sets, 2, slots, 4) for slots in (1, 2, 3)])
    assert found.srp_GLW[0, 0, 0] == pytest.approx(brute_srp(sets, 2, 4))


@pytest.mark.parametrize("length", [1, 5, 64, 1000])
def test_blocks_of_any_length_give_what_the_whole_gives(length: int) -> None:
    trace = random_trace(600, lores=0)._replace(sequence_T=None, domain_T=None, domains=())
    size, viewer = shape(8, 2, layers=4), Viewer(shape(8, 2, layers=4), 63)
    count = LocalityCount(size, (4, 16, 64), (2, 4))
    for begin in range(0, 600, length):
        part = block([[0, 1]], continues=begin > 0)
        count.add(viewer.view(part._replace(expert_TLK=trace.expert_TLK[begin : begin + length])))
    found, whole = count.found(), locality(trace, windows=(4, 16, 64), slots=(2, 4))
    for place, window in enumerate(found.windows):
        assert found.srp_GLW[0, :, place].mean() == pytest.approx(whole.srp[window])
        assert found.srp_size_GLW[0, :, place].mean() == pytest.approx(whole.size_ratio[window])
        assert found.sch_GLWC[0, :, place].mean(0).tolist() == pytest.approx([whole.sch[window][2], whole.sch[window][4]])


def test_windows_that_no_text_is_long_enough_for_are_left_out() -> None:
    size = shape()
    count = LocalityCount(size, [2, 16], [2])
    count.add(Viewer(size, 15).view(block([[0, 1], [0, 1], [2, 3]])))
    assert count.found().windows == [2]
    empty = LocalityCount(size, [2], [2]).found()
    assert (empty.windows, empty.srp_GLW.shape, empty.sch_GLWC.shape) == ([], (1, 1, 0), (1, 1, 0, 1))


@pytest.mark.parametrize(("experts", "top_k", "first", "either"), [(8, 2, 0.125, 0.464), (16, 4, 0.0625, 0.728)])
def test_a_random_router_is_on_the_random_lines(experts: int, top_k: int, first: float, either: float) -> None:
    trace: Trace = random_trace(20_000, experts=experts, top_k=top_k, layers=2, lores=0)
    size = shape_of(trace)
    count, viewer = RepeatCount(size), Viewer(size, 3)
    for part in blocks_of(trace):
        count.add(viewer.view(part))
    found = count.found(count.used_per_token_L)
    assert found.first_GL[-1].tolist() == pytest.approx([first] * 2, abs=0.01)
    assert found.any_GL[-1].tolist() == pytest.approx([either] * 2, abs=0.012)
    assert found.random_first_L[0] == pytest.approx(first)
    assert found.random_any_L[0] == pytest.approx(either, abs=0.0005)
    assert found.exrep_GL[-1].tolist() == pytest.approx(found.random_exrep_L.tolist(), abs=0.01)


def test_a_random_router_has_no_special_tokens_and_no_pairs() -> None:
    model = example(6000, models=1).models[0]
    assert model.co_activation is not None
    assert len(model.co_activation.pairs) <= 1
    assert sum(len(entry.tokens) for entry in model.specialisation.tokens) <= 2
    assert model.specialisation.vocabulary_L.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert model.lores is not None
    assert model.lores.repeat_GL[-1].tolist() == pytest.approx([model.lores.random_repeat] * 4, abs=0.06)
    assert model.lores.entropy_GLE.min() > 0.99
    saturation = example(6000).saturation
    assert saturation is not None
    assert saturation.share_SL[0].tolist() == pytest.approx(saturation.random_L.tolist(), abs=0.02)
