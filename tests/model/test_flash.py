"""Which implementation computes a layer's attention, and what is asked of flash_attn.

flash_attn itself needs a GPU. Here its function is written down as its documentation has it (masks aligned to the last key, windows of keys on the
left, slopes times distance), and everything else is the real code: what reaches it has to be right for the results to be.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.model import GPT, build_cache, choose_attention
from megatron.model.attention import choice
from megatron.model.attention.flash import FlashAttention, reason_against_flash
from megatron.model.attention.sdpa import CausalSdpa
from tests.model.tiny_model import DENSE, model_section, tiny_model, tokens

CUDA = torch.device("cuda")


def documented_flash_attn(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, window_size: tuple[int, int], **more: Any) -> Tensor:
    """q [B, S, H, d], k and v [B, P, K, d]."""
    alibi_slopes = more.pop("alibi_slopes")
    assert more == {"causal": True}
    assert dropout_p == 0
    length, positions, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bshd,bphd->bhsp", q, k) / math.sqrt(q.shape[3])
    distance = torch.arange(length)[:, None] + positions - length - torch.arange(positions)
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32
        scores = scores - alibi_slopes[:, None, None] * distance.abs()
    left, right = window_size
    assert right <= 0, "a causal mask lets nothing see to its right"
    hidden = (distance < 0) | (distance > (positions if left < 0 else left))
    return torch.einsum("bhsp,bphd->bshd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = documented_flash_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.3")
    monkeypatch.setattr(choice, "reason_against_flash", lambda *_: None)


def chosen(section: ModelConfig) -> GPT:
    model = tiny_model(section, DENSE).eval()
    choose_attention(section, model)
    return model


@pytest.mark.parametrize(
    "keys", [{}, {"num_kv_heads": 2}, {"pos_emb": "alibi"}, {"sliding_window_width": 2}, {"pos_emb": "alibi", "sliding_window_width": 3}]
)
def test_flash_and_global_layers_compute_the_same(keys: dict[str, Any], installed: None) -> None:
    text, plain = tokens(), tiny_model(model_section(**keys), DENSE).eval()
    section = model_section(**keys, attention_config=[[["flash", "global"], "all"]])
    model, cache = chosen(section), build_cache(section, 2, 9)
    assert [type(layer.attention.attend) for layer in model.layers] == [FlashAttention, type(plain.layers[1].attention.attend)]
    wanted = plain(text).logits_BSV
    torch.testing.assert_close(model(text).logits_BSV, wanted, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        parts = [model(part, cache=cache).logits_BSV for part in text.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-5)


def test_documents_are_kept_apart_in_flash_layers_too(installed: None) -> None:
    text, document_BS = tokens(), torch.tensor([[0] * 4 + [1] * 5] * 2)
    models = [chosen(model_section(attention_config=[[[kind], "all"]])) for kind in ("flash", "global")]
    for model in models:
        model.separate_documents(attention=True, positions=False)
    flash_logits, global_logits = (model(text, document_BS=document_BS).logits_BSV for model in models)
    assert isinstance(models[0].layers[0].attention.attend, FlashAttention)
    assert torch.equal(flash_logits, global_logits)


def test_the_log_says_once_why_flash_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = chosen(model_section(attention_config=[[["flash", "global"], "all"]]))
        chosen(model_section(attention_config=[[["global"], "all"]]))
    lines = [record.message for record in caplog.records if "attention_config" in record.message]
    reason = "flash_attn runs on CUDA devices only, and this device is cpu"
    assert lines == [f"attention_config: flash in 1 of 2 layers, computed as the others: {reason}."]
    assert all(isinstance(layer.attention.attend, CausalSdpa) for layer in model.layers)


@pytest.mark.parametrize(
    ("keys", "dtype", "reason"),
    [
        ({}, torch.float32, "flash_attn computes in fp16 and bfloat16 only, and this model is in float32"),
        ({"pos_emb": "rpe"}, torch.bfloat16, "flash_attn cannot add the biases of pos_emb: rpe"),
        ({"hidden_size": 2048}, torch.bfloat16, "flash_attn takes heads of up to 256 dimensions, and this model's heads have 512"),
    ],
)
def test_why_a_model_cannot_use_flash(keys: dict[str, Any], dtype: torch.dtype, reason: str) -> None:
    assert reason_against_flash(model_section(**keys), CUDA, dtype) == reason


def test_the_package_has_to_be_there_and_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_version)
    assert reason_against_flash(model_section(), CUDA, torch.float16) == "flash_attn is not installed (pip install flash-attn)"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.3.6")
    assert reason_against_flash(model_section(), CUDA, torch.float16) == "flash_attn 2.3.6 is installed, and 2.4 or newer is needed"


@pytest.mark.parametrize("version", ["2.4.0.post1", "2.8.3", "3.0.0b1"])
def test_these_versions_do(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert reason_against_flash(model_section(), CUDA, torch.bfloat16) is None
