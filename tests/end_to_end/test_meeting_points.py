"""Routers, kinds of experts and what stands around them, together: each pair trains, resumes, decodes, is offloaded, traced and exported, and the
numbers of every step agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config.size import count_parameters
from megatron.convert.errors import ConversionError
from megatron.convert.to_huggingface import Export, export_checkpoint
from megatron.data.progress import build_reporter
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.runner import build_runner
from megatron.monitor.alerts import routers as alerts
from megatron.testing.tiny import TINY_MOE, tiny_config
from megatron.training.callbacks import alerts as alerts_callback
from tests.training.runs import train_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
GATED: dict[str, Any] = {"activation": "swiglu", "norm": "rmsnorm"}
LORES: dict[str, Any] = {"moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_top_k": 2, "moe_lore_rank": 4, "lore_loss": True}
ZEROS: dict[str, Any] = {"moe_zero_experts": 2, "moe_copy_experts": 1, "moe_constant_experts": 1}
BY_LAYER: dict[str, Any] = {"moe_num_experts": None, "moe_num_experts_by_layer": [4, 6]}
CASES: dict[str, dict[str, Any]] = {
    "topk, one LoRE-expert, zero experts": {**LORES, **ZEROS, "moe_router_type": "topk", "moe_top_k": 1},
    "sinkhorn, LoREs that gate, zero experts": {**LORES, **ZEROS, "moe_router_type": "sinkhorn", "moe_lore_interaction": "gated"},
    "sigmoid, LoREs beside, residual": {**LORES, "moe_router_type": "sigmoid", "moe_lore_interaction": "standalone", "moe_use_residual": True},
    "top_p, LoREs, numbers by layer": {**LORES, **BY_LAYER, "moe_router_type": "top_p", "moe_top_k": None},
    "topk, gated, numbers by layer": {**GATED, **BY_LAYER, "moe_router_type": "topk", "moe_expert_bias": True},
    "expert_choice, decomposed, shared": {"moe_router_type": "expert_choice", "moe_expert_type": "decomposed", "moe_num_shared_experts": 1},
    "quantile_balancing, LoREs, latent and zero": {**LORES, **GATED, **ZEROS, "moe_router_type": "quantile_balancing", "moe_latent_size": 16},
    "expert_threshold, LoREs beside, zero": {**LORES, **ZEROS, "moe_router_type": "expert_threshold", "moe_lore_interaction": "standalone"},
    "document_pool, decomposed, a pool of 4 of 8": {
        **ZEROS,
        "moe_router_type": "document_pool",
        "moe_expert_type": "decomposed",
        "moe_eval_document_expert_pool": 4,
    },
    "recurrent, unrouted LoREs, segments": {
        **LORES,
        "moe_router_type": "recurrent",
        "moe_router_rnn_hidden_size": 12,
        "moe_lore_routed": False,
        "moe_lore_top_k": None,
        "moe_expert_segments": 2,
        "lore_loss": False,
    },
    "smoe_dropout, gated LoREs, zero and shared": {**LORES, **GATED, **ZEROS, "moe_router_type": "smoe_dropout", "moe_num_shared_experts": 1},
}
REFUSED = {"document_pool, decomposed, a pool of 4 of 8": "moe_eval_document_expert_pool: 4 "}
"""What no class of Hugging Face can hold, and why."""


def values_of(case: dict[str, Any], corpus: Path, folder: Path) -> dict[str, Any]:
    losses = {"load_balance": 0.01, "z_loss": 0.001} | ({"lore_balance": 0.01} if case.get("lore_loss") else {})
    run = {"save": str(folder), "checkpoint_factor": 2, "train_iters": 4, "lr_decay_iters": 4, "routing_trace_steps": [2], "init_method_std": 0.2}
    data = {"data_path": str(corpus), "split": "80, 10, 10", "tokenizer_type": "CharLevelTokenizer", "gradient_accumulation_steps": 2}
    values = {**TINY_MOE, **case, **run, **data, "moe_losses": losses}
    return {key: value for key, value in values.items() if value is not None and key != "lore_loss"}


@torch.inference_mode()
def logits_of(ready: ReadyModel, tokens_BS: Tensor) -> Tensor:
    logits = ready.gpt(tokens_BS).logits_BSV
    assert logits is not None
    return logits[0]


def check_resume(values: dict[str, Any], straight: list[float], folder: Path) -> None:
    shutil.copytree(Path(values["save"]) / "global_step2", folder / "global_step2")
    (folder / "latest").write_text("global_step2")
    assert train_losses({**values, "save": str(folder), "load": str(folder)}) == straight[2:]


def check_decoding(ready: ReadyModel, tokens_BS: Tensor, expected_SV: Tensor) -> None:
    """The fastest runner gives the logits of the whole text, in a prompt and token by token."""
    runner, tokens = build_runner(ready), tokens_BS[0].tolist()
    state = runner.open(len(tokens))
    got = [runner.prefill(state, tokens[:5]), *(runner.decode([state], [token])[0] for token in tokens[5:9])]
    torch.testing.assert_close(torch.stack(got), expected_SV[4:9, : ready.tokenizer.vocab_size], rtol=1e-4, atol=1e-4)


def check_export(case: str, values: dict[str, Any], ready: ReadyModel, folder: Path) -> None:
    """The command compares the logits itself."""
    request = Export(Path(values["save"]), folder, save_tokenizer=False)
    if case in REFUSED:
        with pytest.raises(ConversionError, match=REFUSED[case]):
            export_checkpoint(request, build_reporter(quiet=True))
        return
    exported = export_checkpoint(request, build_reporter(quiet=True))
    assert exported.parameters >= sum(parameter.numel() for parameter in ready.gpt.parameters())
    assert exported.compared is not None


@pytest.mark.parametrize("case", CASES)
def test_what_meets_in_one_model(case: str, corpus: Path, tmp_path: Path, tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LORE_STEPS", 1), ("LORE_BLOCKS", 2), ("ROWS", 1)):
        monkeypatch.setattr(alerts, name, value)  # so that the alerts judge LoREs in this short run
    monkeypatch.setattr(alerts_callback, "YOUNG_STEPS", 1)
    values = values_of(CASES[case], corpus, tmp_path / "run")
    straight = train_losses(values)
    check_resume(values, straight, tmp_path / "again")

    keys = {key: value for key, value in values.items() if key != "routing_trace_steps"} | {"load": values["save"]}
    config = tiny_config(keys)
    ready, tokens_BS = load_ready_model(config), torch.randint(1, 128, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = logits_of(ready, tokens_BS)
    assert sum(p.numel() for p in ready.gpt.parameters()) == count_parameters(config.model, config.moe, ready.gpt.vocab_size).total_sum
    if config.moe.moe_router_type != "expert_choice":  # its choice depends on the tokens of a call
        check_decoding(ready, tokens_BS, expected)

    ways: list[dict[str, Any]] = [{"slots": max(config.moe.expert_counts)}, {"slots": 2, "policy": "static", "misses": "in_place"}]
    for way in [*ways, {"slots": 4, "granularity": "lore"}] if "lore_balance" in values["moe_losses"] else ways:
        offloaded = load_ready_model(tiny_config(keys, expert_offload=way))
        assert torch.equal(logits_of(offloaded, tokens_BS), expected)
        runner = build_runner(offloaded)
        state = runner.open(12)
        runner.prefill(state, tokens_BS[0, :5].tolist())
        assert runner.decode([state], [7]).isfinite().all()

    routing, page = tool("tools/analysis/routing.py"), tool("tools/analysis/dashboard.py")
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 8)
    arguments = ["--json-only", "--out", str(tmp_path / "report")]
    assert routing.main([values["save"], "--text", f"fox={text}", "--tokens", "100", *arguments]) == 0
    assert json.loads((tmp_path / "report/routing.json").read_text())["models"][0]["layers"]
    assert routing.main([str(tmp_path / "run/routing_traces/step_00000002"), *arguments]) == 0
    assert page.main([values["save"], "--output", str(tmp_path / "page.html"), "--once"]) == 0
    check_export(case, values, ready, tmp_path / "hf")
