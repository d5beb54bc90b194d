"""The emulated GPU: it computes what the PTX manual says, and it finds every planted fault and none where there is none."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc.building import built

HALVES = [torch.bfloat16, torch.float16]


class Planted:
    """The kernels of planted.cu. A call returns the lines of the detector."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.emulation_reports.restype = ctypes.c_char_p
        self.functions.emulation_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]

    def __call__(self, kernel: str, *arguments: Tensor | int) -> list[str]:
        self.functions.emulation_clear()
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        for number, tensor in enumerate(tensors):
            self.functions.emulation_register(tensor.data_ptr(), tensor.numel() * tensor.element_size(), f"tensor {number}".encode())
        given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        status = getattr(self.functions, f"planted_{kernel}")(*given)
        lines: list[str] = self.functions.emulation_reports().decode().splitlines()
        assert status == bool(lines)
        return lines


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted(built("planted", [Path(__file__).with_name("planted.cu")]))


def ints(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def test_a_missing_barrier_is_a_race(planted: Planted) -> None:
    out = ints(64)
    assert planted("pass_on", out, 1) == []
    assert out.tolist() == [*range(2, 65), 1]
    lines = planted("pass_on", out, 0)
    assert re.fullmatch(
        r"pass_on\[0,0,0\]: race: thread \d+ of block 0 (reads|writes) static shared memory \+ \d+, "
        r"which thread \d+ of block 0 (reads|writes) with no barrier between",
        lines[0],
    )
    assert len(lines) == 21  # 20 are kept
    assert "more" in lines[-1]


def test_a_barrier_of_a_warp_does_not_order_two_warps(planted: Planted) -> None:
    lines = planted("pass_on", ints(64), 2)
    assert len(lines) == 2  # thread 31 reads what 32 wrote, and 63 what 0 wrote
    assert all("race" in line for line in lines)


def test_a_barrier_of_a_warp_orders_its_lanes(planted: Planted) -> None:
    out = ints(64)
    assert planted("pass_within_warp", out, 2) == []
    assert out.tolist() == [*range(1, 32), 0] * 2
    lines = planted("pass_within_warp", out, 1)
    assert any(re.search(r"writes shared memory \+ \d+, which thread \d+ of block 0 reads", line) for line in lines)


@pytest.mark.parametrize("wait", [-1, 0], ids=["none", "for all but the last group"])
def test_a_missing_wait_for_a_copy(planted: Planted, wait: int) -> None:
    given, out = torch.arange(256, dtype=torch.int32), ints(256)
    assert planted("copy_through", given, out, 1) == []
    assert torch.equal(given, out)
    lines = planted("copy_through", given, out, wait)
    assert "copy_through[0,0,0]: missing wait: thread 0 of block 0 reads shared memory + 0 before the asynchronous copy" in lines[0]
    assert not torch.equal(given, out)  # the copy never came


@pytest.mark.parametrize("at", [4, -1, 1 << 28])
def test_a_read_out_of_bounds(planted: Planted, at: int) -> None:
    given, out = torch.arange(4.0), torch.zeros(1)
    assert planted("read_at", given, out, 3) == []
    assert out.item() == 3
    lines = planted("read_at", given, out, at)
    assert len(lines) == 1
    assert "out of bounds: thread 0 of block 0 reads 4 bytes" in lines[0]
    assert out.item() == 3  # the kernel did not go on


def test_a_write_out_of_bounds_of_shared_memory(planted: Planted) -> None:
    assert planted("write_shared_at", 15) == []
    assert "out of bounds: thread 0 of block 0 writes 4 bytes of shared memory (64 bytes) + 64" in planted("write_shared_at", 16)[0]


def test_a_wide_access_is_aligned(planted: Planted) -> None:
    given, out = torch.zeros(24, dtype=torch.int16), torch.zeros(1, dtype=torch.int16)
    assert planted("read_wide", given, out, 8) == []
    assert "unaligned: thread 0 of block 0 accesses 16 bytes" in planted("read_wide", given, out, 12)[0]


def test_a_barrier_that_some_threads_never_reach(planted: Planted) -> None:
    assert planted("some_threads_wait", 64) == []
    assert planted("some_threads_wait", 0) == []
    lines = planted("some_threads_wait", 63)
    assert "deadlock: not every thread comes to the same barrier" in lines[0]
    assert "thread 0 waits at a barrier, thread 63 has ended" in lines[0]


def test_lanes_at_different_operations(planted: Planted) -> None:
    assert planted("some_lanes_shuffle", 32) == []
    assert "lanes of a warp are at different operations: shuffle_xor and __syncwarp" in planted("some_lanes_shuffle", 31)[0]


def test_blocks_that_write_one_place(planted: Planted) -> None:
    out = ints(1)
    assert planted("blocks_add", out, 1) == []
    assert out.item() == 3
    lines = planted("blocks_add", out, 0)
    assert "race: thread 0 of block 1 reads tensor 0 + 0, which thread 0 of block 0 writes" in lines[0]


def test_an_order_that_matters_shows(planted: Planted) -> None:
    """1 + 1e8 - 1e8 is 0 from the first to the last, and 1 from the last to the first."""
    given, sums = torch.tensor([1, 1e8, -1e8]), []
    for backwards in (0, 1):
        planted.functions.emulation_run_backwards(backwards)
        out = torch.zeros(1)
        assert planted("blocks_add_floats", given, out) == []
        sums.append(out.item())
    planted.functions.emulation_run_backwards(0)
    assert sums == [0, 1]


def test_more_shared_memory_than_there_is(planted: Planted) -> None:
    assert planted("too_much_shared", 64) == []
    assert "a device refuses this launch: grid 1x1x1, 1 threads, 250000 bytes of shared memory" in planted("too_much_shared", 250_000)[0]


def test_what_lanes_tell_each_other(planted: Planted) -> None:
    out = ints(160)
    assert planted("lane_results", out) == []
    lanes = range(32)
    xor, up, from_7, where, same = out.view(5, 32).tolist()
    assert xor == [lane ^ 5 for lane in lanes]
    assert up == [max(lane - 3, lane if lane < 3 else 0) for lane in lanes]
    assert from_7 == [7] * 32
    assert where == [sum(1 << lane for lane in lanes if lane % 3 == 0)] * 32
    assert [mask & 0xFFFFFFFF for mask in same] == [sum(1 << other for other in lanes if other % 4 == lane % 4) for lane in lanes]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_product_of_a_warp(planted: Planted, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, width, generator=generator).to(dtype) for width in (16, 8))
    d = torch.full((16, 8), torch.nan)
    assert planted("multiply", a, b, d, int(dtype == torch.float16)) == []
    torch.testing.assert_close(d, a.float() @ b.float())


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_loading_matrices(planted: Planted, count: int, transposed: int) -> None:
    """Lane i holds the numbers 2(i%4) and the next of row i//4 of each matrix, or of its transpose."""
    given, out = torch.arange(256, dtype=torch.int16).view(4, 8, 8), torch.zeros(32, count, 2, dtype=torch.int16)
    assert planted("load", given, out, count, transposed) == []
    for matrix in range(count):
        wanted = given[matrix].T if transposed else given[matrix]
        assert torch.equal(out[:, matrix].reshape(8, 8), wanted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_numbers_are_those_of_torch(planted: Planted, dtype: torch.dtype) -> None:
    half = int(dtype == torch.float16)
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    wide = torch.zeros(len(bits))
    planted.functions.planted_widen(ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(wide.data_ptr()), len(bits), half)
    assert torch.equal(wide.nan_to_num(nan=1e9, posinf=2e9), bits.view(dtype).float().nan_to_num(nan=1e9, posinf=2e9))
    floats = (
        torch.randint(-(1 << 31), 1 << 31, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )
    floats = torch.cat([floats, wide, torch.nextafter(wide, torch.tensor(torch.inf)), torch.randn(1000) * 1e-6])
    rounded = torch.zeros(len(floats), dtype=torch.int16)
    planted.functions.planted_round(ctypes.c_void_p(floats.data_ptr()), ctypes.c_void_p(rounded.data_ptr()), len(floats), half)
    torch.testing.assert_close(rounded.view(dtype), floats.to(dtype), rtol=0, atol=0, equal_nan=True)
