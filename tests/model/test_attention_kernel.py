"""A layer whose attention is the compiled op computes what PyTorch's SDPA does, and leaves to it what the op cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.kernels.attention import OP
from megatron.model import GPT, build_cache, build_model, choose_attention
from megatron.model.attention.context import FusedContext, KernelAttend, split_and_attend
from megatron.testing.tiny import tiny_config

pytestmark = pytest.mark.skipif(OP.status("cpu")["compiled"] is not None, reason=f"compiled attention: {OP.status('cpu')['compiled']}")

LENGTH = 64
FUSED = {
    "rotary": {},
    "half turned": {"rotary_pct": 0.5},
    "grouped": {"num_kv_heads": 2},
    "learned": {"pos_emb": "learned"},
}
SEPARATE = {"norms": {"use_qk_layernorm": True}}
PLAIN = {"window": {"sliding_window_width": 5}, "alibi": {"pos_emb": "alibi"}, "rpe": {"pos_emb": "rpe"}}


def models(keys: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, GPT, GPT]:
    """Two equal models: SDPA's, and the one that the op was chosen for."""
    config = tiny_config(seq_length=LENGTH, max_position_embeddings=LENGTH, **keys)
    plain, chosen = (build_model(config.model, config.moe, 64, seed=1, dtype=dtype) for _ in range(2))
    choose_attention(config.model, chosen)
    return config.model, plain, chosen


def text_of(batch: int = 2) -> Tensor:
    return torch.randint(64, (batch, LENGTH), generator=torch.Generator().manual_seed(2))


def results(model: GPT, **given: Any) -> list[Tensor]:
    """Logits, and the gradient of every parameter."""
    logits = model(text_of(), **given).logits_BSV
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits.dtype)
    return [logits.detach(), *torch.autograd.grad(logits, list(model.parameters()), grad, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("keys", [*FUSED.values(), *SEPARATE.values()], ids=[*FUSED, *SEPARATE])
def test_same_logits_and_gradients(keys: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    _, plain, chosen = models(keys, dtype)
    assert all(isinstance(layer.attention.context, FusedContext) != (keys in SEPARATE.values()) for layer in chosen.layers)
    assert all(isinstance(layer.attention.attend, KernelAttend) == (keys in SEPARATE.values()) for layer in chosen.layers)
    for got, wanted in zip(results(chosen), results(plain), strict=True):
        scale = float(wanted.abs().max()) or 1.0
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("keys", PLAIN.values(), ids=PLAIN)
def test_windows_and_biases_stay_with_sdpa(keys: dict[str, Any]) -> None:
    _, plain, chosen = models(keys)
    assert all(layer.attention.context is split_and_attend for layer in chosen.layers)
    assert [type(layer.attention.attend) for layer in chosen.layers] == [type(layer.attention.attend) for layer in plain.layers]


@pytest.mark.parametrize("keys", [{}, {"use_qk_layernorm": True}], ids=["fused", "separate"])
def test_documents_caches_and_dropout_go_to_sdpa(keys: dict[str, Any]) -> None:
    """Their results are those of the model without the op, bit for bit."""
    model, plain, chosen = models({**keys, "attention_dropout": 0.5})
    for each in (plain, chosen):
        each.separate_documents(attention=True, positions=True)
    document_BS = torch.arange(LENGTH)[None].expand(2, -1) // 20
    torch.manual_seed(0)
    wanted = plain(text_of(), document_BS=document_BS).logits_BSV
    torch.manual_seed(0)
    assert torch.equal(chosen(text_of(), document_BS=document_BS).logits_BSV, wanted)
    torch.manual_seed(0)
    wanted = plain(text_of()).logits_BSV
    torch.manual_seed(0)
    assert torch.equal(chosen(text_of()).logits_BSV, wanted)
    plain.eval(), chosen.eval()
    whole = plain(text_of()).logits_BSV
    cache = build_cache(model, 2, LENGTH)
    parts = torch.cat([chosen(part, cache=cache).logits_BSV for part in text_of().split([40, 1, 23], dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_the_config_can_keep_sdpa() -> None:
    config = tiny_config()
    model = build_model(config.model, config.moe, 64, seed=1)
    choose_attention(config.model, model, "torch")
    assert all(layer.attention.context is split_and_attend for layer in model.layers)
