"""What every test shares: the accelerator is chosen before anything imports DeepSpeed, one thread a process, and the folder of test material."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DISK_BYTES = 1 << 20

# One thread a process: results do not depend on the machine's core count, and parallel test processes do not fight over it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Nothing in the tests may reach for a hub or an account.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_configure(config: pytest.Config) -> None:
    """Hear Ctrl-C; tell DeepSpeed which accelerator to use while it can still listen: CUDA for `pytest -m gpu`, the CPU for everything else."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # `nohup make test &`: what the tests start is to hear Ctrl-C all the same
        signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if config.getoption("markexpr").strip() == "gpu" else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The launcher's tests go first; and skip what is marked `gpu` where PyTorch finds no CUDA device."""
    # They fork. Linux refuses that to a process that has reserved more than the memory there is, and each ZeRO 3 engine of a test reserves 2 GB that
    # DeepSpeed does not give back.
    items.sort(key=lambda item: not item.nodeid.startswith("tests/launcher/"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device; PyTorch finds none"))


@pytest.fixture(autouse=True)
def garbage_of_the_test_alone() -> Iterator[None]:
    """Collections pass over what was there before the test: DeepSpeed asks for six each time it makes an optimizer, of all that pytest has loaded."""
    gc.freeze()
    yield
    gc.collect()
    gc.unfreeze()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Test material kept outside the repository: $STRUCTMOE_SHARED, or the folder `shared` beside the checkout; skips where there is none."""
    chosen = os.environ.get("STRUCTMOE_SHARED")
    folder = Path(chosen) if chosen else REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no test material at {folder} (set STRUCTMOE_SHARED to the folder that holds it)")
    return folder


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Path | None]:
    """`folder` as a disk of one mebibyte; None where none can be mounted.

    A process of its own takes the disk away: at a word from this one, or when this one is gone, however it was ended.
    """
    work = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && echo mounted && { read -r _; umount --lazy "$2"; }'
    command = ["sh", "-c", work, "sh", str(DISK_BYTES), str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    assert holder.stdout is not None
    there = holder.stdout.readline() != b""
    try:
        yield folder if there else None
    finally:
        holder.communicate(b"\n")
        assert not there or holder.returncode == 0, f"{folder} is still mounted"


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """An empty disk of one mebibyte; None where none can be mounted."""
    with mounted(tmp_path_factory.mktemp("disk")) as disk:
        yield disk


@pytest.fixture(scope="session")
def tool(repository: Path) -> Callable[[str], ModuleType]:
    """The module of the command line at this path of the checkout."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(name).stem, repository / name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


SENTENCE = "the quick brown fox jumps over the lazy dog and the dog looks up at the fox "


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of an indexed file of 60 documents of characters below 128, with something to learn in them."""
    import numpy as np

    from megatron.data.indexed import IndexedDatasetWriter

    prefix = tmp_path_factory.mktemp("corpus") / "foxes"
    with IndexedDatasetWriter(prefix, np.dtype("uint16")) as writer:
        for number in range(60):
            text = (SENTENCE * 3)[number % 40 :][: 120 + number]
            writer.add(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16))
    return prefix
