"""What these tests share: three groups of processes do all the work that needs DeepSpeed (its import and start cost seconds each time)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.testing.distributed import run_distributed
from tests.checkpoint import rank_work
from tests.conftest import DISK_BYTES, mounted

ONE = [(dtype, stage) for dtype in ("fp32", "bf16") for stage in range(4)]
TWO = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3)]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def first_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A small disk for the first group."""
    with mounted(tmp_path_factory.mktemp("first_disk")) as disk:
        yield disk


@pytest.fixture(scope="session")
def one(root: Path, first_disk: Path | None) -> dict[str, Any]:
    """What one process returned, by the name of the work."""
    work: dict[str, tuple[Any, ...]] = {
        "save_and_resume": (str(root), ONE),
        "replace_same_step": (str(root / "replace"),),
        "bad_client_states": (str(root / "bad"),),
        "save_without_rng": (str(root / "without_rng"),),
        "pipeline_module": (str(root / "pipeline"),),
        "save_gpt": (str(root / "gpt"),),
        "unwritable": (str(root / "file" / "run"),),
    }
    (root / "file").write_text("no directory")
    if first_disk is not None:
        work["fill_disk"] = (str(first_disk), DISK_BYTES - 80_000)
    return run_distributed(rank_work.several, 1, work)[0]


@pytest.fixture(scope="session")
def two(root: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two processes returned, by the name of the work."""

    def saved_in(stage: int) -> str:
        return f"{root}/fp32 zero[{stage}] world 2/global_step3"

    work = {
        "save_and_resume": (str(root), TWO),
        "load_at_another_size": (one["save_and_resume"]["fp32", 0]["saved"],),
        "resume_in_other_stage": (str(root),),
        "changed_on_the_last_rank": (
            {"weight": f"{root}/fp32 zero[0] world 2/global_step3", "exp_avg": f"{root}/fp32 zero[1] world 2/global_step3"},
        ),
        "load_foreign": (one["save_gpt"],),
        "fill_up": (str(root / "full"),),
    }
    return run_distributed(rank_work.several, 2, work)


@pytest.fixture(scope="session")
def weight_paths(one: dict[str, Any], two: list[dict[str, Any]]) -> list[str]:
    """Checkpoints of different stages and numbers of processes."""
    return [results["save_and_resume"]["fp32", stage]["saved"] for results in (one, two[0]) for stage in (0, 1, 3)]


@pytest.fixture(scope="session")
def afterwards(weight_paths: list[str]) -> dict[str, Any]:
    """What one process returned that loads the others' checkpoints, by the name of the work."""
    return run_distributed(rank_work.several, 1, {"load_weights_only": (weight_paths, [0, 2, 3], "fp32"), "refusals": (weight_paths[1],)})[0]
