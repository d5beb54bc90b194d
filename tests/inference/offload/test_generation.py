"""generate.py with experts in slow memory: the same texts, the counters, the trace, and what --check says before."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron.analysis.offload_size import offload_lines
from megatron.checkpoint.errors import CheckpointError
from megatron.config import config_from_dict
from megatron.config.section import ConfigError
from megatron.data.progress import LineReporter
from megatron.inference.evaluation import evaluate
from megatron.inference.offload.counters import Counters, counters_table
from megatron.inference.offload.simulate import simulate
from megatron.inference.session import generate
from megatron.monitor.routing_trace import read_trace
from megatron.testing.tiny import TINY_DENSE, TINY_MOE, TINY_STRUCTMOE
from tests.inference.offload.conftest import load


def run(keys: dict[str, Any], tmp_path: Path, **changes: Any) -> tuple[str, list[Any]]:
    """(what appears on the screen, the samples)."""
    (tmp_path / "prompts.txt").write_text("Fellow\nThe Union\n")
    output = {"sample_input_file": str(tmp_path / "prompts.txt"), "sample_output_file": str(tmp_path / "samples.jsonl"), "maximum_tokens": 8}
    console = Console(file=io.StringIO(), width=200)
    generate(config_from_dict({**keys, **output, **changes}), console, input, terminal=False)
    texts = [json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    return console.file.getvalue(), texts  # type: ignore[attr-defined]


def test_the_same_texts_with_counters_and_a_trace(gated: dict[str, Any], tmp_path: Path) -> None:
    offload = {"slots": 3, "policy": "lfu", "counters": str(tmp_path / "counters.json"), "record": str(tmp_path / "trace.npz")}
    _, expected = run(gated, tmp_path)
    shown, texts = run(gated, tmp_path, expert_offload=offload)
    assert texts == expected
    assert "hit rate" in shown
    assert "wasted" not in shown
    counters = json.loads((tmp_path / "counters.json").read_text())
    assert list(counters["layers"]) == ["0", "1", "2"]
    assert counters["total"]["hits"] == sum(layer["hits"] for layer in counters["layers"].values()) > 0
    assert counters["total"]["bytes"] > 0
    simulated = simulate(read_trace(tmp_path / "trace.npz"), policy="lfu", slots=3)
    assert {str(number): each.hits for number, each in simulated.items()} == {number: each["hits"] for number, each in counters["layers"].items()}


def test_stored_logits_are_compared(gated: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tmp_path / "run"
    shutil.copytree(gated["load"], checkpoint)
    file = checkpoint / "global_step2/mp_rank_00_model_states.pt"
    ready = load(gated)
    logits = ready.gpt(torch.arange(32)[None]).logits_BSV
    assert logits is not None
    keys = {**gated, "load": str(checkpoint), "checkpoint_validation_with_forward_pass": True}
    torch.save({**torch.load(file, weights_only=True), "checkpoint_validation_logits": logits[0]}, file)
    load(keys, slots=2)
    torch.save({**torch.load(file, weights_only=True), "checkpoint_validation_logits": logits[0] * 1.2}, file)
    with pytest.raises(CheckpointError, match="does not give the logits of the saved model"):
        load(keys, slots=2)


def test_the_table_of_what_happened_fits_a_terminal() -> None:
    counted = Counters(calls=9, selections=18000, hits=9000, bytes=12_345_678_901, prefetches=700, prefetches_used=600)
    console = Console(file=io.StringIO(), width=100)
    console.print(counters_table({0: counted, 11: counted}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split()[-4:] == ["s", "prefetched", "used", "wasted"]
    assert lines[-1].split()[:5] == ["all", "36,000", "18,000", "50.0%", "0"]
    assert "…" not in "".join(lines)


def shown(base: Any, **offload: Any) -> dict[str, str]:
    return dict(offload_lines(config_from_dict({**base, "expert_offload": offload}), 128))


def test_check_says_what_will_happen() -> None:
    assert shown(TINY_MOE, slots=2)["resident"].startswith("2 of 4 experts of each layer (lru), ")
    assert shown(TINY_MOE, slots=9)["resident"].startswith("4 of 4 experts")
    assert "about 4 of 4 experts of each layer (lru) in 1GB" in shown(TINY_MOE, memory="1GB")["resident"]
    assert "memory 10MB does not suffice for 2 experts of each layer; give about 301MB or more" in shown(TINY_MOE, memory="10MB")["resident"]
    lores = shown(TINY_STRUCTMOE, slots=5, granularity="lore")
    assert lores["resident"].startswith("5 of 16 LoREs of each layer")
    # two layers, 16 LoREs each: A of 8 x 32 and B of 8 x 64 numbers of 4 bytes
    assert lores["LoREs at rest"] == "96.0 KiB in the checkpoint"
    assert not list(offload_lines(config_from_dict(dict(TINY_MOE)), 128))


@pytest.mark.parametrize(
    ("base", "offload", "message"),
    [
        (TINY_MOE, {}, "give either slots or memory"),
        (TINY_MOE, {"slots": 2, "memory": "1GB"}, "give either slots or memory"),
        (TINY_MOE, {"memory": "much"}, "must be a number and a unit, such as 2GB or 512MiB"),
        (TINY_MOE, {"slots": 1}, r"must be at least 2, so that one token's experts \(moe_top_k\) are resident together"),
        (TINY_STRUCTMOE, {"slots": 3, "granularity": "lore"}, r"must be at least 4, so that the LoREs of one expert \(moe_num_lores\)"),
        (TINY_MOE, {"slots": 2, "granularity": "lore"}, "lore needs experts of moe_expert_type: structmoe whose LoREs are routed"),
        (TINY_MOE, {"slots": 2, "policy": "belady"}, "belady needs trace"),
        (TINY_MOE, {"slots": 2, "misses": "in_place"}, "in_place needs policy: static, because no expert moves; policy is lru"),
        (TINY_MOE, {"slots": 2, "misses": "in_place", "policy": "static", "prefetch": True}, "there is nothing to prefetch"),
        (TINY_DENSE, {"slots": 2}, "needs a model with experts, and moe_num_experts is 1"),
        (TINY_MOE, {"slots": 2, "policy": "fifo"}, "'on_demand', 'lru', 'lfu', 'static'"),
    ],
)
def test_what_is_refused(base: Any, offload: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({**base, "expert_offload": offload})


@pytest.mark.parametrize(
    ("offload", "entry"),
    [
        ({"record": "trace.npz"}, "expert_offload.record"),
        ({"policy": "belady", "trace": "trace.npz"}, "expert_offload.policy: belady"),
        ({"granularity": "lore"}, "expert_offload.granularity: lore"),
        ({"policy": "static", "misses": "in_place"}, "expert_offload.misses: in_place"),
    ],
)
def test_int8_needs_the_compiled_decoder(offload: dict[str, Any], entry: str) -> None:
    with pytest.raises(ConfigError, match=f"int8 needs the compiled decoder, and {entry} the model's own forward; remove one of the two"):
        config_from_dict({**TINY_STRUCTMOE, "inference_weights": "int8", "expert_offload": {"slots": 4, **offload}})
    config_from_dict({**TINY_STRUCTMOE, "inference_weights": "int8", "expert_offload": {"slots": 4}})


def test_int8_without_offload_needs_it_too() -> None:
    with pytest.raises(ConfigError, match=r"and kernel_backends\.decode: reference the model's own forward"):
        config_from_dict({**TINY_MOE, "inference_weights": "int8", "kernel_backends": {"decode": "reference"}})


def test_belady_and_a_comparison_of_logits_are_refused() -> None:
    keys = {**TINY_MOE, "expert_offload": {"slots": 2, "policy": "belady", "trace": "trace.npz"}}
    with pytest.raises(ConfigError, match="belady takes the calls of its trace alone, and checkpoint_validation_with_forward_pass makes one more"):
        config_from_dict({**keys, "checkpoint_validation_with_forward_pass": True})


def test_scores_are_counted_but_not_recorded(gated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Fellow citizens")
    console = Console(file=io.StringIO(), width=200)

    def score(**offload: Any) -> None:
        keys = {**gated, "eval_text_files": ["text.txt"], "expert_offload": {"slots": 3, **offload}}
        evaluate(config_from_dict(keys), console, LineReporter(Console(file=io.StringIO())))

    score(counters="counters.json")
    assert "hit rate" in console.file.getvalue()  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "counters.json").read_text())["total"]["selections"] > 0
    with pytest.raises(ConfigError, match=r"'expert_offload\.record': eval\.py does not serve requests, so there is nothing to record; remove it"):
        score(record="trace.npz")
