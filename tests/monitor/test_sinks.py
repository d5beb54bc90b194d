"""Files and dashboards get what they are given, and resumed runs leave one record of each step."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import pytest

from megatron.config.logging import LoggingConfig
from megatron.monitor.alerts.alert import Alert
from megatron.monitor.comet import CometSink
from megatron.monitor.curves import Curves
from megatron.monitor.jsonl import JsonlSink, last_numbers, read_jsonl
from megatron.monitor.sink import SinkUnavailable, scalars
from megatron.monitor.tensorboard import TensorboardSink
from megatron.monitor.wandb import WandbSink

ALERT = Alert(kind="loss_spike", step=7, value=9.0, limit=math.inf, seen="The loss is 9.")


def write_steps(path: Path, steps: range, *, resume_from: int) -> None:
    sink = JsonlSink(path, resume_from=resume_from)
    for step in steps:
        sink.write(step, {"train/lm_loss": float(step)})
    sink.close()


def test_jsonl_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "run/metrics.jsonl"
    write_steps(path, range(1, 8), resume_from=0)
    write_steps(path, range(5, 10), resume_from=4)
    assert [record["iteration"] for record in read_jsonl(path)] == list(range(1, 10))


def test_jsonl_of_a_new_run_moves_the_old_one_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4), resume_from=0)
    write_steps(path, range(1, 3), resume_from=0)
    assert [record["iteration"] for record in read_jsonl(path)] == [1, 2]
    assert [record["iteration"] for record in read_jsonl(tmp_path / "metrics.jsonl.previous")] == [1, 2, 3]


def test_jsonl_has_the_final_evaluation_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4), resume_from=0)
    sink = JsonlSink(path, resume_from=3)
    sink.write(2, {"validation/lm_loss": 2.0})
    sink.write(3, {"gradient_norms/w": 3.0})
    for _ in range(2):
        sink.write(3, {"test/lm_loss": 1.0})
        sink.close()
        sink = JsonlSink(path, resume_from=3, final_evaluation_follows=True)
    sink.write(3, {"test/lm_loss": 1.0})
    sink.close()
    keys = ["validation/lm_loss", "gradient_norms/w", "test/lm_loss"]
    assert [list(record)[1] for record in read_jsonl(path)] == ["train/lm_loss"] * 3 + keys, "the evaluation in between and other records stay"


def test_the_last_losses_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_numbers(path, "train/lm_loss", 3) == []
    write_steps(path, range(1, 50_000), resume_from=0)
    with path.open("a") as file:
        file.write('{"iteration": 50000, "train/lm_loss": null}\n{"iteration": 50001, "train/lm_l')
    assert path.stat().st_size > 2**21
    assert last_numbers(path, "train/lm_loss", 3) == [49_997.0, 49_998.0, 49_999.0]


def test_jsonl_survives_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4), resume_from=0)
    with path.open("a") as file:
        file.write('{"iteration": 4, "train/lm_l')
    write_steps(path, range(4, 6), resume_from=3)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_jsonl_is_strict_json_for_nan_and_keeps_tables(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_from=0)
    sink.write(1, {"train/lm_loss": math.nan, "train/grad_norm": math.inf, "moe/expert_load": [[1, 2]]})
    assert path.read_text() == '{"iteration": 1, "train/lm_loss": null, "train/grad_norm": null, "moe/expert_load": [[1, 2]]}\n'


def test_jsonl_has_alerts_and_a_resumed_run_forgets_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_from=0)
    sink.alert(ALERT)
    sink.close()
    record = {"kind": "loss_spike", "step": 7, "layer": None, "value": 9.0, "limit": None, "seen": "The loss is 9.", "try": ALERT.advice}
    assert list(read_jsonl(path)) == [{"iteration": 7, "alert": record}]
    JsonlSink(path, resume_from=6).close()
    assert list(read_jsonl(path)) == []


def test_scalars_name_the_layers_and_the_columns_of_tables() -> None:
    given = {"a": 1, "b_by_layer": [0.5, 2], "c": [[1, 2], [3]]}
    assert scalars(given) == {"a": 1.0, "b/layer_0": 0.5, "b/layer_1": 2.0, "c/layer_0/0": 1.0, "c/layer_0/1": 2.0, "c/layer_1/0": 3.0}


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    sink = TensorboardSink(str(tmp_path), Curves("TensorBoard", detail="detailed", most=500), resume_from=0)
    sink.write(3, {"train/lm_loss": 2.5, "moe/expert_load": [[1, 2]]})
    sink.alert(ALERT)
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["moe/expert_load/layer_0/0", "moe/expert_load/layer_0/1", "train/lm_loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/lm_loss")] == [(3, 2.5)]
    (text,) = events.Tensors("alerts/loss_spike/text_summary")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (7, ALERT.sentence)


def test_comet_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml", reason="the package comet_ml is not installed")
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")  # restored after the test
    keys = {
        "comet_workspace": "forest",
        "comet_project": "animals",
        "comet_experiment_name": "fox",
        "comet_tags": ["red"],
        "comet_others": {"den": 7},
    }
    sink = CometSink(LoggingConfig(use_comet=True, curves="detailed", **keys), {"num_layers": 2})  # type: ignore[arg-type]
    sink.write(3, {"train/lm_loss": 2.5, "moe/expert_load": [[1, 2]]})
    sink.alert(ALERT)
    sink.close()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        about = json.loads(files.read("experiment.json"))
        messages = [json.loads(line)["payload"] for line in files.read("messages.json").splitlines()]
    assert (about["project_name"], about["workspace"], about["tags"]) == ("animals", "forest", ["red"])
    metrics = [message["metric"] for message in messages if message.get("metric", {}).get("metricName", "").startswith(("train", "moe"))]
    expected = {"train/lm_loss": 2.5, "moe/expert_load/layer_0/0": 1, "moe/expert_load/layer_0/1": 2}
    assert {metric["metricName"]: metric["metricValue"] for metric in metrics} == expected
    assert {metric["step"] for metric in metrics} == {3}
    text = json.dumps(messages)
    assert ALERT.seen in text
    assert all(word in text for word in ('"num_layers"', '"den"', '"fox"'))


def test_comet_without_an_account_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml", reason="the package comet_ml is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    with pytest.raises(
        SinkUnavailable, match=r"use_comet: true, but Comet refused: .*API key.* Log in with `comet login`, or set COMET_START_ONLINE"
    ):
        CometSink(LoggingConfig(use_comet=True), {})


def test_wandb_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    wandb.teardown()  # it remembers the folder of an earlier run in this process
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # otherwise its service tries to reach the network first
    keys = {
        "wandb_run_name": "fox",
        "wandb_group": "animals",
        "wandb_project": "forest",
        "wandb_team": "rangers",
        "wandb_host": "https://wandb.example",
    }
    sink = WandbSink(LoggingConfig(use_wandb=True, **keys), {"num_layers": 2}, rank=1)  # type: ignore[arg-type]
    sink.write(1, {"train/lm_loss": 2.5})
    sink.alert(ALERT)
    run = sink._run
    assert (run.name, run.group, run.project, run.entity) == ("fox-rank1", "animals", "forest", "rangers")
    assert run.settings.base_url == "https://wandb.example"
    assert run.config["num_layers"] == 2
    sink.close()
    wandb.teardown()  # its service may write the file's end after a run's `finish`
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert ALERT.seen.encode() in file.read_bytes()


def test_a_metrics_file_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "metrics.jsonl").symlink_to("elsewhere/metrics.jsonl")
    for step in (1, 2):
        sink = JsonlSink(tmp_path / "metrics.jsonl", resume_from=step - 1)
        sink.write(step, {"train/lm_loss": 1.0})
        sink.close()
    assert (tmp_path / "metrics.jsonl").is_symlink()
    assert [record["iteration"] for record in read_jsonl(tmp_path / "elsewhere/metrics.jsonl")] == [1, 2]
