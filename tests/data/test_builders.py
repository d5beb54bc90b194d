"""The index builders, NumPy's and the compiled ones, against NeoX's loops written out plainly; and which of the two are used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron.data import builders as package
from megatron.data.builders import builders, load_compiled, reference, source_digest
from megatron.data.builders.reference import BLOCK, index_dtype

COMPILED, WHY_NOT = load_compiled()
NEEDS_COMPILED = pytest.mark.skipif(COMPILED is None, reason=f"no compiled builders: {WHY_NOT}; `make setup` compiles them where there is a compiler")
BUILDERS = [pytest.param(reference, id="numpy"), pytest.param(COMPILED, id="compiled", marks=NEEDS_COMPILED)]


def walk(sizes: list[int], seq_length: int, rows: int) -> list[list[int]]:
    """The cutting of samples: fill up with documents, the last token of a sample is the first of the next."""
    found, position, offset = [[0, 0]], 0, 0
    while len(found) < rows:
        remaining = seq_length + 1
        while remaining:
            length = sizes[position] - offset
            remaining -= length
            if remaining <= 0:
                offset += remaining + length - 1
                remaining = 0
            else:
                position, offset = position + 1, 0
        found.append([position, offset])
    return found


def next_fit(sizes: list[int], filled: int, limit: int) -> tuple[list[int], int]:
    """The joining of whole documents."""
    starts = []
    for position, size in enumerate(sizes):
        if filled == 0 or filled + size > limit:
            starts.append(position)
            filled = 0
        filled += size
    return starts, filled


def greedy(weights: np.ndarray, size: int) -> list[tuple[int, int]]:
    """The blending of data sets."""
    counts, order = [0] * len(weights), []
    for i in range(size):
        lag = [weight * max(float(i), 1.0) - count for weight, count in zip(weights.tolist(), counts, strict=True)]
        best = lag.index(max(lag))
        order.append((best, counts[best]))
        counts[best] += 1
    return order


@pytest.mark.parametrize("builders", BUILDERS)
class TestBuilders:
    def test_cutting_equals_the_plain_walk(self, builders: ModuleType) -> None:
        rng = np.random.default_rng(0)
        for _ in range(200):
            sizes_N = rng.integers(0, 9, rng.integers(1, 20), dtype=np.int32)
            order_P = rng.integers(0, len(sizes_N), rng.integers(1, 30), dtype=np.int32)
            seq_length, sizes = int(rng.integers(1, 12)), sizes_N[order_P].tolist()
            if sum(sizes) <= seq_length:
                continue
            rows = (sum(sizes) - 1) // seq_length + 1
            found = builders.cut_samples(sizes_N, order_P, seq_length, rows)
            assert found.dtype == np.int32
            assert found.tolist() == walk(sizes, seq_length, rows)

    def test_cutting_more_tokens_than_32_bits_can_count(self, builders: ModuleType) -> None:
        sizes_N = np.array([2**31 - 1, 0, 1, 2**31 - 2], np.int32)
        order_P = np.array([0, 3, 1, 2, 0, 0, 3, 3, 0, 1], np.int32)
        sizes = sizes_N[order_P].tolist()
        for seq_length in (10**8 + 7, 2**31 - 2, 2**31 - 1, 2**32 + 1):
            rows = (sum(sizes) - 1) // seq_length + 1
            assert builders.cut_samples(sizes_N, order_P, seq_length, rows).tolist() == walk(sizes, seq_length, rows)

    def test_too_few_tokens_are_refused(self, builders: ModuleType) -> None:
        for sizes in ([3, 4], [0], []):
            with pytest.raises(ValueError, match=f"{sum(sizes)} tokens are too few for 9 rows every 1 tokens"):
                builders.cut_samples(np.array(sizes, np.int32), np.arange(len(sizes), dtype=np.int32), 1, 9)

    def test_a_document_that_the_file_does_not_have_is_refused(self, builders: ModuleType) -> None:
        with pytest.raises(IndexError):
            builders.cut_samples(np.array([3, 4], np.int32), np.array([0, 2], np.int32), 1, 5)

    def test_joining_equals_the_plain_loop(self, builders: ModuleType) -> None:
        rng = np.random.default_rng(1)
        for _ in range(300):
            sizes = rng.integers(1, rng.integers(2, 15), rng.integers(0, 30), dtype=np.int32)
            filled, limit = int(rng.integers(0, 12)), int(rng.integers(2, 12))
            starts, left = builders.pack_documents(sizes, filled, limit)
            assert (starts.tolist(), left) == next_fit(sizes.tolist(), filled, limit)
            assert starts.dtype == np.int64

    def test_joining_more_tokens_than_32_bits_can_count(self, builders: ModuleType) -> None:
        sizes = np.array([2**31 - 1, 1, 2**31 - 1, 2**31 - 1, 5], np.int32)
        for limit in (2**31 - 1, 2**31, 2**32, 2**33):
            starts, left = builders.pack_documents(sizes, 7, limit)
            assert (starts.tolist(), left) == next_fit(sizes.tolist(), 7, limit)

    @pytest.mark.parametrize(
        "weights", [[1.0], [1, 1], [1, 1, 1], [0.2, 0.5, 0.3], [0, 1, 2], [1e-9, 1], [0.7, 0.1, 0.1, 0.1], [3, 1, 4, 1, 5, 9, 2, 6]]
    )
    @pytest.mark.parametrize("size", [0, 1, BLOCK, 3 * BLOCK + 5])
    def test_blending_equals_the_plain_loop(self, builders: ModuleType, weights: list[float], size: int) -> None:
        weights_D = np.array(weights) / np.sum(weights)
        assert self.blended(builders, weights_D, size) == greedy(weights_D, size)

    def test_blending_by_many_random_weights(self, builders: ModuleType) -> None:
        rng = np.random.default_rng(0)
        for count in (2, 3, 10, 100):
            weights_D = rng.random(count) ** 4
            weights_D /= weights_D.sum()
            assert self.blended(builders, weights_D, 2 * BLOCK + 100) == greedy(weights_D, 2 * BLOCK + 100)

    def blended(self, builders: ModuleType, weights_D: np.ndarray, size: int) -> list[tuple[int, int]]:
        dataset_I, sample_I = builders.blend(weights_D, size)
        assert (dataset_I.dtype, sample_I.dtype) == (np.uint8, np.int64)
        return list(zip(dataset_I.tolist(), sample_I.tolist(), strict=True))


def test_positions_and_rows_beyond_32_bits_get_64() -> None:
    assert index_dtype(2**31 - 2, 5) == np.int32
    assert index_dtype(2**31 - 1, 5) == np.int64
    assert index_dtype(5, 2**31) == np.int64


@NEEDS_COMPILED
def test_both_builders_agree_on_large_random_data() -> None:
    assert COMPILED is not None
    rng = np.random.default_rng(2)
    for scale in (3, 1000, 2**31 - 1):
        sizes_N = rng.integers(0, scale, 20_000, dtype=np.int32)
        order_P = rng.permutation(np.tile(np.arange(20_000, dtype=np.int32), 3))
        rows = (3 * int(sizes_N.sum(dtype=np.int64)) - 1) // (2 * scale) + 1
        ours, right = (module.cut_samples(sizes_N, order_P, 2 * scale, rows) for module in (COMPILED, reference))
        assert ours.dtype == right.dtype
        assert np.array_equal(ours, right)
        positive_P = sizes_N[sizes_N > 0]
        (ours, left), (right, expected) = (module.pack_documents(positive_P, scale // 2, 3 * scale) for module in (COMPILED, reference))
        assert np.array_equal(ours, right)
        assert left == expected
    weights_D = rng.random(254) ** 3
    for ours, right in zip(*(module.blend(weights_D / weights_D.sum(), 200_000) for module in (COMPILED, reference)), strict=True):
        assert np.array_equal(ours, right)


@NEEDS_COMPILED
def test_what_cannot_be_counted_is_refused_by_the_compiled_builders() -> None:
    assert COMPILED is not None
    one = np.ones(1, np.int32)
    for seq_length, rows in ((0, 1), (1, 0), (2**62, 4)):
        with pytest.raises(ValueError, match=f"{rows} rows every {seq_length} tokens cannot be counted in 64 bits"):
            COMPILED.cut_samples(one, np.zeros(1, np.int32), seq_length, rows)
    with pytest.raises(ValueError, match="1 to 256 weights"):
        COMPILED.blend(np.ones(257) / 257, 3)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The choice is made anew, here and after the test."""
    builders.cache_clear()
    yield
    builders.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_the_choice_is_made_and_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(package, "COMPILED", "megatron.data.builders.nothing")
    with caplog.at_level("INFO"):
        assert builders() is builders() is reference
    assert caplog.text.count("Index builders: NumPy, because none were compiled. `python csrc/build.py` compiles faster ones.") == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise ImportError('undefined symbol: _Z3foo')", r"cannot be loaded \(undefined symbol: _Z3foo\)"),
        ("source_digest = 'of another day'", "were built from other sources than those in csrc/data"),
    ],
)
def test_a_build_that_is_broken_or_stale_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: str) -> None:
    name = f"compiled_{len(reason)}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(package, "COMPILED", name)
    module, why = load_compiled()
    assert module is None
    assert re.search(reason, why)


def test_changed_sources_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("int a;")
    before = source_digest(tmp_path)
    (tmp_path / "a.cpp").write_text("int b;")
    assert source_digest(tmp_path) != before
    assert source_digest(tmp_path) == source_digest(tmp_path)
