"""The heap for large blocks: what it hands out, what it takes back, and that PyTorch uses it."""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron.kernels import heap
from megatron.kernels.compiled import load
from megatron.kernels.registry import KernelUnavailable
from tests.training.runs import outer_environment

BUILT, REASON = load()
pytestmark = [
    pytest.mark.skipif(BUILT is None, reason=f"kernels: {REASON}"),
    pytest.mark.skipif(sys.platform != "linux", reason="the heap is for Linux"),
]
MIB = 1 << 20
REPOSITORY = Path(__file__).resolve().parents[2]


class Blocks:
    """`get` and `put` of the heap, by their addresses."""

    def __init__(self) -> None:
        assert BUILT is not None
        get, put = BUILT.heap_functions()
        self.get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(get)
        self.put = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(put)


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    assert BUILT is not None
    heap.use_heap()
    BUILT.use_heap(True)
    before = BUILT.heap_used()
    yield Blocks()
    assert BUILT.heap_used() == before


def test_no_block_touches_another(blocks: Blocks) -> None:
    draw, held, sizes = random.Random(0), {}, [MIB, MIB + 1, 3 * MIB, 5 * MIB - 64, 17 * MIB]
    for number in range(600):
        if held and draw.random() < 0.5:
            block, (size, mark) = held.popitem() if draw.random() < 0.3 else (key := draw.choice(list(held)), held.pop(key))
            assert ctypes.string_at(block, 64) == bytes([mark]) * 64
            assert ctypes.string_at(block + size - 64, 64) == bytes([mark]) * 64
            assert blocks.put(block)
        else:
            size, mark = draw.choice(sizes), number % 251
            block = blocks.get(size)
            assert block
            assert block % 64 == 0
            assert block not in held
            ctypes.memset(block, mark, 64)
            ctypes.memset(block + size - 64, mark, 64)
            held[block] = size, mark
    for block in held:
        assert blocks.put(block)


def test_a_gap_takes_a_block_of_its_size_and_the_smallest_gap_is_chosen(blocks: Blocks) -> None:
    small, wall, large, end = (blocks.get(size * MIB) for size in (33, 1, 35, 1))
    blocks.put(large)
    blocks.put(small)
    assert blocks.get(33 * MIB) == small
    assert blocks.get(35 * MIB) == large
    for block in (small, wall, large):
        blocks.put(block)
    assert blocks.get(69 * MIB) == small, "the three gaps are one"
    for block in (small, end):
        blocks.put(block)


def test_blocks_of_one_size_begin_at_different_places_of_a_page(blocks: Blocks) -> None:
    held = [blocks.get(4 * MIB) for _ in range(12)]
    assert len({block % 4096 for block in held}) > 6
    for block in held:
        blocks.put(block)


def test_what_it_does_not_give(blocks: Blocks) -> None:
    assert BUILT is not None
    assert [blocks.get(size) for size in (0, 1, MIB - 1, 2**63, 2**64 - 1, 2**61)] == [None] * 6
    assert not blocks.put(None)
    assert not blocks.put(id(blocks))
    block = blocks.get(MIB)
    assert not blocks.put(block + 64)
    BUILT.use_heap(False)
    assert blocks.get(MIB) is None
    assert blocks.put(block), "also while it is not used"
    assert not blocks.put(block), "not twice"
    BUILT.use_heap(True)


def test_threads_at_once(blocks: Blocks) -> None:
    def work(seed: int) -> bool:
        draw, good = random.Random(seed), True
        for _ in range(300):
            size = draw.randrange(MIB, 4 * MIB)
            block = blocks.get(size)
            ctypes.memset(block, seed, 64)
            good &= ctypes.string_at(block, 64) == bytes([seed]) * 64
            good &= blocks.put(block)
        return good

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def run(program: str, **environment: str) -> list[str]:
    """The lines that a process of its own prints."""
    start = "import os, torch\nfrom megatron.kernels.heap import use_heap, trim_heap\nfrom megatron.kernels.compiled import load\nbuilt, _ = load()\n"
    arguments = [sys.executable, "-c", start + textwrap.dedent(program)]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, env=outer_environment() | environment, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_pytorch_takes_large_blocks_from_it_and_memory_goes_back() -> None:
    said = run("""
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

        before = torch.ones(2 << 20)
        print(use_heap(), built.heap_used())
        del before  # a block from before
        tensor, small = torch.ones(16 << 20), torch.ones(100)
        view = tensor[5:]
        del tensor
        print(built.heap_used() >> 20)
        view.untyped_storage().resize_(8 << 20)
        print(built.heap_used() >> 20, float(view[:100].sum()))
        del view
        print(built.heap_used())
        many = [torch.ones(1 << 20) for _ in range(64)]
        kept = many[::2]
        del many
        full = resident()
        trim_heap()
        print(full - resident() > 100, all(float(each.sum()) == 1 << 20 for each in kept))
    """)
    assert said == ["True 0", "64", "8 100.0", "0", "True True"]


def test_a_profile_sees_its_blocks() -> None:
    said = run("""
        from torch.profiler import ProfilerActivity, profile
        use_heap()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            kept = torch.empty(4 << 20)
            torch.empty(8 << 20)
        print(sum(event.self_cpu_memory_usage for event in seen.key_averages()) >> 20)
    """)
    assert said == ["16"]


def test_a_forked_process_can_use_it() -> None:
    said = run("""
        use_heap()
        tensor = torch.ones(4 << 20)
        child = os.fork()
        if child == 0:
            other = torch.full((4 << 20,), 2.0)
            tensor += other
            os._exit(0 if float(tensor[-1]) == 3 else 1)
        print(os.waitpid(child, 0)[1], float(tensor.sum()) == 4 << 20)
    """)
    assert said == ["0 True"]


def test_a_limit_of_the_address_space() -> None:
    """Then it asks for no more addresses than it needs, and a block that cannot be had is an error and no crash."""
    said = run("""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        use_heap()
        tensors = [torch.ones(16 << 20) for _ in range(10)]
        print(built.heap_used() >> 20, sum(float(t[0]) for t in tensors))
        try:
            torch.empty(8 << 30)
        except RuntimeError as error:
            print("allocate" in str(error))
        print(float(torch.ones(16 << 20)[-1]))
    """)
    assert said == ["640 10.0", "True", "1.0"]


def test_the_systems_heap() -> None:
    program = "print(use_heap())\nkept = torch.ones(4 << 20)\nprint(built.heap_used())"
    assert run(program, NEOX_HEAP="system") == ["False", "0"]
    assert run(program, NEOX_HEAP="ours")[0] == "True"
    said = run(
        "from megatron.kernels.registry import KernelUnavailable\ntry:\n    use_heap()\nexcept KernelUnavailable as e:\n    print(e)", NEOX_HEAP="x"
    )
    assert said == ["NEOX_HEAP = 'x' is not known; it is one of: ours, system"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "was not compiled"), (b"", "cannot be loaded"), ("other", f"was compiled for PyTorch 1.0 and this is {torch.__version__}")],
)
def test_a_library_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | str | None, reason: str) -> None:
    library = tmp_path / "libneox_torch.so"
    if content == "other":
        library.write_bytes(heap.LIBRARY.read_bytes().replace(torch.__version__.encode() + b"\0", b"1.0".ljust(len(torch.__version__) + 1, b"\0")))
    elif isinstance(content, bytes):
        library.write_bytes(content)
    monkeypatch.setattr(heap, "LIBRARY", library)
    found, why = heap._library()
    assert found is None
    assert reason in why


def test_a_part_of_a_program_with_the_systems_heap() -> None:
    program = """
        from megatron.kernels.heap import systems_heap
        large = 4 << 20
        with systems_heap():
            first = torch.ones(large)
        print(built.heap_used())
        use_heap()
        with systems_heap():
            second = torch.ones(large)
            print(built.heap_used())
        third = torch.ones(large)
        print(built.heap_used() >> 20)
        del first, second, third
        print(built.heap_used())
    """
    assert run(program) == ["0", "0", "16", "0"]


def test_it_is_called_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = heap.use_heap()
    monkeypatch.setenv("NEOX_HEAP", "system")
    assert heap.use_heap() == first
    heap.use_heap.cache_clear()
    monkeypatch.setenv("NEOX_HEAP", "nonsense")
    with pytest.raises(KernelUnavailable, match="nonsense"):
        heap.use_heap()
    heap.use_heap.cache_clear()
    monkeypatch.undo()
    assert heap.use_heap() == first
