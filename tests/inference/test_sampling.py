"""The choice of a token against distributions made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.inference import sampling as module
from megatron.inference.sampling import (
    Sampling,
    choose_token,
    draw,
    greedy,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    scale_by_temperature,
    token_probabilities,
)

INF = math.inf
NOTHING = torch.empty(0, dtype=torch.int64)


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(logits_V: torch.Tensor) -> list[int]:
    return (logits_V > -INF).nonzero()[:, 0].tolist()


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    assert greedy(torch.tensor([1.0, 3.0, 2.0])) == 1
    assert greedy(torch.tensor([1.0, 3.0, 3.0])) == 1


@pytest.mark.parametrize(
    ("k", "expected"),
    [(0, [0, 1, 2, 3]), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3])],
)
def test_top_k_keeps_the_k_largest(k: int, expected: list[int]) -> None:
    assert kept(keep_top_k(logits(0.2, 0.3, 0.4, 0.1), k)) == expected


def test_top_k_of_equal_tokens_keeps_the_first_ones_exactly_k() -> None:
    assert kept(keep_top_k(logits(0.1, 0.3, 0.3, 0.3), 2)) == [1, 2]
    assert kept(keep_top_k(torch.zeros(5), 3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.0, [0, 1, 2, 3]), (1e-9, [2]), (0.5, [2]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [0, 1, 2]), (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_that_reach_it(p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(logits(0.125, 0.25, 0.5, 0.125), p)) == expected


def test_top_p_of_equal_tokens_keeps_the_first_ones() -> None:
    assert kept(keep_top_p(torch.zeros(4), 0.5)) == [0, 1]


def test_top_p_of_one_is_off_even_where_rounding_would_drop_the_tail() -> None:
    assert kept(keep_top_p(torch.tensor([0.0, -80.0, -90.0]), 1.0)) == [0, 1, 2]


@pytest.mark.parametrize("p", [0.001, 0.3, 0.7, 0.99, 0.999999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_top_p_is_the_same_whether_all_tokens_are_sorted_or_the_largest(p: float, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_V = torch.randn(300, generator=seeded(), dtype=torch.float64) * spread
    order_V = logits_V.argsort(descending=True, stable=True)
    before_V = logits_V.softmax(0)[order_V].cumsum(0) - logits_V.softmax(0)[order_V]
    expected = sorted(order_V[before_V < p].tolist())
    for sorted_first in (1, 10, 299, 300, 1024):
        monkeypatch.setattr(module, "SORTED", sorted_first)
        assert kept(keep_top_p(logits_V, p)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.0, [0, 1, 2, 3]), (0.2, [0, 1, 2, 3]), (0.3, [0, 1, 2]), (0.6, [1, 2]), (0.9, [2]), (1.0, [2])])
def test_min_p_keeps_what_has_a_share_of_the_most_likely(p: float, expected: list[int]) -> None:
    assert kept(keep_min_p(logits(0.2, 0.3, 0.4, 0.1), p)) == expected


def test_min_p_comes_after_the_temperature() -> None:
    """At temperature 2, 0.1 has half the probability of 0.4; at temperature 1 it has a quarter."""
    assert token_probabilities(logits(0.4, 0.1, 0.5), Sampling(1.0, min_p=0.4)).tolist()[1] == 0
    assert token_probabilities(logits(0.4, 0.1, 0.5), Sampling(2.0, min_p=0.4)).tolist()[1] > 0


def test_repetition_is_penalized_once_in_the_direction_of_less_likely() -> None:
    found = penalize_repetition(torch.tensor([2.0, -2.0, 3.0, -1.0, 0.0]), torch.tensor([0, 1, 0, 4, 0]), 2.0)
    assert found.tolist() == [1.0, -4.0, 3.0, -1.0, 0.0]


def test_a_penalty_acts_on_the_most_likely_token_too() -> None:
    seen = torch.tensor([1])
    assert choose_token(torch.tensor([1.0, 1.5]), Sampling(repetition_penalty=2.0), seeded(), seen) == 0
    assert choose_token(torch.tensor([1.0, 1.5]), Sampling(), seeded(), seen) == 1


@pytest.mark.parametrize("sampling", [Sampling(0.7, 8, 0.9, 0.05, 1.3), Sampling(1.4, min_p=0.2), Sampling(0.9, top_p=0.5), Sampling(1.0, 3)])
def test_the_distribution_is_that_of_transformers(sampling: Sampling) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process", reason="compares with transformers")
    logits_V, seen_T = torch.randn(40, generator=seeded(2)) * 3, torch.tensor([3, 9, 3, 17])
    chain = [processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty), processors.TemperatureLogitsWarper(sampling.temperature)]
    chain += [processors.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chain += [processors.TopPLogitsWarper(sampling.top_p)] if sampling.top_p else []
    chain += [processors.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    scores_BV = logits_V[None]
    for processor in chain:
        scores_BV = processor(seen_T[None], scores_BV)
    found = token_probabilities(penalize_repetition(logits_V, seen_T, sampling.repetition_penalty), sampling)
    torch.testing.assert_close(found.float(), scores_BV[0].softmax(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 39, 40, 99])
def test_a_draw_among_the_top_k_is_the_draw_from_the_whole_distribution(k: int) -> None:
    sampling, logits_V = Sampling(1.5, top_k=k, top_p=0.95), torch.randn(40, generator=seeded(4))
    found, expected = seeded(1), seeded(1)
    for _ in range(50):
        assert choose_token(logits_V, sampling, found, NOTHING) == draw(token_probabilities(logits_V, sampling), expected)


def test_the_input_stays_as_it_is() -> None:
    given = logits(0.2, 0.5, 0.3)
    before = given.clone()
    keep_top_k(given, 1), keep_top_p(given, 0.1), keep_min_p(given, 0.9), scale_by_temperature(given, 0.5)
    penalize_repetition(given, torch.tensor([1]), 2.0)
    assert torch.equal(given, before)


def test_temperature_sharpens_and_flattens() -> None:
    given = logits(0.2, 0.8)
    torch.testing.assert_close(token_probabilities(given, Sampling(1.0)), torch.tensor([0.2, 0.8], dtype=torch.float64))
    torch.testing.assert_close(token_probabilities(given, Sampling(0.5)), torch.tensor([1 / 17, 16 / 17], dtype=torch.float64))
    torch.testing.assert_close(token_probabilities(given, Sampling(2.0)), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))


def test_no_temperature_is_too_small() -> None:
    assert token_probabilities(torch.tensor([900.0, -900.0, 899.0]), Sampling(1e-300)).tolist() == [1.0, 0.0, 0.0]


def test_top_k_comes_before_top_p() -> None:
    """Of 0.4, 0.3, 0.3 top-k leaves 4/7 and 3/7; top-p 0.5 then needs only the first. The other order would leave two."""
    assert token_probabilities(logits(0.4, 0.3, 0.3), Sampling(1.0, top_k=2, top_p=0.5)).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling(top_p=0.9), Sampling(top_k=3, top_p=0.9, min_p=0.9)])
def test_temperature_zero_is_greedy_whatever_else_is_said(sampling: Sampling) -> None:
    generator = seeded()
    before = generator.get_state()
    assert {choose_token(logits(0.3, 0.4, 0.3), sampling, generator, NOTHING) for _ in range(20)} == {1}
    assert torch.equal(generator.get_state(), before)


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    assert {choose_token(logits(0.3, 0.4, 0.3), Sampling(5.0, top_k=1), seeded(seed), NOTHING) for seed in range(20)} == {1}


def test_draws_follow_the_probabilities() -> None:
    generator = seeded(1)
    probability_V = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    counts = torch.bincount(torch.tensor([draw(probability_V, generator) for _ in range(4000)]), minlength=6) / 4000
    assert counts[[0, 2, 5]].sum() == 0
    torch.testing.assert_close(counts.double(), probability_V, atol=0.03, rtol=0)


def test_a_draw_at_either_end_is_a_token_that_can_be() -> None:
    """Uniform numbers 0 and almost 1, and probabilities whose sum is not exactly 1."""

    class Fixed:
        value = 0.0

    def rand(*_: object, **__: object) -> torch.Tensor:
        return torch.tensor([Fixed.value], dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        probability_V = torch.tensor([0.0, 0.3, 0.3, 0.0], dtype=torch.float64)
        for value, expected in [(0.0, 1), (1 - 2**-53, 2)]:
            Fixed.value = value
            assert draw(probability_V, seeded()) == expected


def test_a_seed_reproduces_and_another_differs() -> None:
    def sequence(seed: int) -> list[int]:
        generator = seeded(seed)
        return [choose_token(torch.zeros(100), Sampling(1.0), generator, NOTHING) for _ in range(10)]

    assert sequence(1) == sequence(1) != sequence(2)
