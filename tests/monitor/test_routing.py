"""What the routers do, as numbers: against counts by hand, and in every destination of a run."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch

from megatron.model.state import RouterReport
from megatron.monitor.routing import router_values
from megatron.monitor.sink import scalars
from tests.model.tiny_model import moe_section
from tests.training.runs import run_values, train_losses

LOSSES = {"load_balance": 0.01, "block_wise_selection": 0.1}
BLOCK, WHOLE, LAST = 32768, 1, 4


def test_numbers_of_two_layers_of_different_sizes() -> None:
    """The first layer has two experts, the second four, one of which got nothing; three of eight LoREs of the first got nothing."""
    section = {"moe_num_experts": 1, "moe_num_experts_by_layer": [2, 4], "moe_num_lores": 4, "moe_losses": LOSSES}
    report = RouterReport(
        aux_losses_XA=torch.tensor([[1.5, 0.25], [2.0, 0.75]]),
        expert_load_XE=torch.tensor([[6, 2, 0, 0], [4, 0, 2, 2]]),
        lore_load_XG=torch.tensor([[2, 0, 0, 4, 1, 1, 0, 0] + 8 * [0], 16 * [1]]),
        statistics_XI=torch.tensor([[0.5, 0.25, 1.0, torch.nan, torch.nan], [1.0, 0.75, 1.0, torch.nan, torch.nan]]),
    )
    values = router_values(report, moe_section(**section), 2)
    wanted = {
        "moe/expert_load": [[6, 2], [4, 0, 2, 2]],
        "moe/lore_load": [[2, 0, 0, 4, 1, 1, 0, 0], 16 * [1]],
        "moe/load_imbalance": 1.75,
        "moe/load_imbalance_by_layer": [1.5, 2.0],
        "moe/delta_uniform": (25 + 12.5) / 2,
        "moe/delta_uniform_by_layer": [25.0, 12.5],
        "moe/dead_experts": 1,
        "moe/dead_experts_by_layer": [0, 1],
        "moe/dead_lores": 4,
        "moe/dead_lores_by_layer": [4, 0],
        "moe/router_entropy": 0.75,
        "moe/router_entropy_by_layer": [0.5, 1.0],
        "moe/expert_replacement": 50.0,
        "moe/expert_replacement_by_layer": [25.0, 75.0],
        "moe/experts_per_token": 1.0,
        "moe/experts_per_token_by_layer": [1.0, 1.0],
        "moe/dropped_tokens": 0,
        "moe/load_balance_by_layer": [1.5, 2.0],
        "moe/block_wise_selection_by_layer": [0.25, 0.75],
    }
    assert values == wanted


def test_a_dense_model_has_none() -> None:
    empty = RouterReport(torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 5))
    assert router_values(empty, moe_section(moe_num_experts=1, moe_expert_type="grouped"), 2) == {}


def test_every_number_reaches_every_destination(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 2 and 4 are log steps: the second tells of the tokens of steps 3 and 4 alone."""
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wandb.teardown()  # it remembers the folder of an earlier run in this process
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wanted = {
        "use_wandb": True,
        "tensorboard_dir": "tb",
        "log_interval": 2,
        "moe_losses": LOSSES,
        "metrics_file": "metrics.jsonl",
        "curves": "detailed",
    }
    train_losses(run_values(corpus, None, train_iters=4, eval_iters=0, **wanted))
    records = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    last = {key: value for key, value in records[-1].items() if key.startswith("moe/")}
    report = RouterReport(torch.zeros(2, 2), torch.ones(2, 4), torch.ones(2, 16), torch.cat([torch.zeros(2, 3), torch.full((2, 2), torch.nan)], 1))
    assert last.keys() == router_values(report, moe_section(moe_num_experts=4, moe_num_lores=4, moe_losses=LOSSES), 2).keys()
    assert [sum(row) for row in last["moe/expert_load"]] == [2 * 2 * 16 * 2] * 2, "two steps of 2 sequences of 16 tokens with 2 experts each"
    assert all(0 < entropy <= math.log(4) for entropy in last["moe/router_entropy_by_layer"])

    numbers = scalars(last)
    assert {"moe/expert_load/layer_1/3", "moe/delta_uniform/layer_0", "moe/block_wise_selection/layer_1", "moe/dead_lores"} <= numbers.keys()
    events = EventAccumulator("tb")
    events.Reload()
    assert {key: events.Scalars(key)[-1].value for key in numbers} == pytest.approx(numbers, rel=1e-6)
    assert wandb_history(tmp_path)[-1].items() >= numbers.items()

    out = capsys.readouterr().out
    line = (
        f" routers | load imbalance: {last['moe/load_imbalance']:.2f} | delta uniform: {last['moe/delta_uniform']:.1f}% | "
        f"entropy: {last['moe/router_entropy']:.2f} | expert replacement: {last['moe/expert_replacement']:.1f}% | "
        f"dead experts: {last['moe/dead_experts']} | dead lores: {last['moe/dead_lores']} | dropped tokens: 0 |"
    )
    assert line in out
    assert re.findall(r"^ (samples/sec|routers)", out, re.MULTILINE) == ["samples/sec", "routers"] * 2


def wandb_history(folder: Path) -> list[dict[str, float]]:
    """What an offline run has recorded, a dictionary a step: records of LevelDB's log format (7 bytes before each part, blocks of 32 KiB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, position, parts, history = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if position % BLOCK > BLOCK - 7:
            position += -position % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (WHOLE, LAST):
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    return history
