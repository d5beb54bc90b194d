"""A model that cannot fit the machine is a sentence before any of it is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.config.memory import NotEnoughMemory, Room
from megatron.testing.tiny import TINY_DENSE, tiny_config
from megatron.training.memory import check_comparison_fits, check_training_fits
from tests.training.runs import run_values, train_losses

HUGE = {"hidden_size": 65536, "num_attention_heads": 64, "num_layers": 200}


def test_training_is_refused_with_what_it_needs(corpus: Path, tmp_path: Path) -> None:
    values = {
        key: value for key, value in run_values(corpus, tmp_path / "run").items() if key in TINY_DENSE or not key.startswith(("moe_", "interm"))
    }
    expected = r"Training 10,3\d\d,\d{3},\d{3},\d{3} parameters in fp32 with ZeRO stage 0 \(1 process.* needs at least 11\d{4}\.\d GiB of memory"
    with pytest.raises(NotEnoughMemory, match=expected):
        train_losses({**values, **HUGE})


def gib_needed(**values: object) -> float:
    config = tiny_config({**TINY_DENSE, **HUGE, **values})
    with pytest.raises(NotEnoughMemory) as raised:
        check_training_fits(config, 512, world_size=4)
    return float(re.search(r"at least ([\d.]+) GiB", str(raised.value))[1])  # type: ignore[index]


def test_processes_of_this_machine_and_zero_stages_count(monkeypatch: pytest.MonkeyPatch) -> None:
    one = gib_needed()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert gib_needed() == pytest.approx(4 * one)
    copies = 4  # DeepSpeed keeps a second fp32 copy of the weights under ZeRO
    assert gib_needed(zero_optimization={"stage": 3}) == pytest.approx(one * (4 + 8 + copies) / 12)
    assert gib_needed(zero_optimization={"stage": 1}) == pytest.approx(4 * one * (4 + (8 + copies) / 4) / 12)


def test_what_is_offloaded_must_fit_the_cpu_and_the_rest_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 processes on 8 GPUs. In bf16 at stage 1 a process has all weights (2 bytes each) and an eighth of the optimizer's state (12 bytes each)."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    rooms = {"gpu": 80 << 30, "cpu": 1 << 40}
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (rooms["gpu"], rooms["gpu"]))
    monkeypatch.setattr("megatron.training.memory.machine_memory", lambda: Room(rooms["cpu"], rooms["cpu"]))
    sizes = {"hidden_size": 8192, "num_attention_heads": 64, "num_layers": 40, "precision": "bfloat16"}

    def refused(**zero: object) -> str:
        try:
            check_training_fits(tiny_config({**TINY_DENSE, **sizes, "zero_optimization": {"stage": 1, **zero}}), 512, world_size=8)
        except NotEnoughMemory as error:
            return str(error)
        return ""

    assert "needs at least 105.0 GiB of memory, but this GPU has 80.0 GiB" in refused()
    assert refused(offload_optimizer={"device": "cpu"}) == ""
    rooms["cpu"] = 300 << 30
    assert "offloaded to the CPU (8 process(es) here) needs at least 360.1 GiB of memory, but this machine has 300.0 GiB" in refused(
        offload_optimizer={"device": "cpu"}
    )
    rooms["gpu"] = 40 << 30
    assert "needs at least 60.0 GiB of memory, but this GPU has 40.0 GiB" in refused(offload_optimizer={"device": "cpu"})
    all_moved = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert "needs at least 420.2 GiB of memory, but this machine has 300.0 GiB" in refused(**all_moved)


def test_the_comparison_of_a_conversion_names_its_option() -> None:
    with pytest.raises(NotEnoughMemory, match=r"in float32 needs at least .* Add --skip-check to convert without it\."):
        check_comparison_fits(tiny_config({**TINY_DENSE, **HUGE}), 512)
