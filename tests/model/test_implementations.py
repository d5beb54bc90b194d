"""What a model says of its implementations when it has its device, and the norms of apex.

apex itself needs a GPU. Here the functions that it compiles are written down as its own sources call them, and everything else is the real code.
"""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config.neox import NeoXConfig
from megatron.kernels.rms_norm import OP, rms_norm
from megatron.kernels.rms_norm import apex as apex_norm
from megatron.kernels.rms_norm.apex import Apex
from megatron.kernels.rms_norm.reference import Reference
from megatron.model import GPT, build_model, choose_implementations, norms
from megatron.model.apex import layer_norm, reason_against_apex
from megatron.testing.tiny import tiny_config


def built(config: NeoXConfig) -> GPT:
    return build_model(config.model, config.moe, 64, seed=1)


def chosen(config: NeoXConfig) -> GPT:
    model = built(config)
    choose_implementations(config.model, config.moe, model)
    return model


def logged(caplog: pytest.LogCaptureFixture, config: NeoXConfig) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "megatron.model"):
        chosen(config)
    return [record.message for record in caplog.records]


def test_a_dense_model_logs_no_kernel_of_experts(caplog: pytest.LogCaptureFixture) -> None:
    dense = [line.split()[1] for line in logged(caplog, tiny_config(moe_num_experts=1, moe_top_k=1))]
    assert dense == ["attention", "linear_cross_entropy"]
    more = logged(caplog, tiny_config(moe_num_experts=2, moe_top_k=1, moe_router_type="topk", kernel_backends={"permute": "reference"}))
    assert "kernel permute on cpu: reference" in more
    assert [line.split()[1] for line in more] == [*dense, "grouped_gemm", "grouped_lore", "permute", "route"]


def test_the_config_chooses_the_rms_norm() -> None:
    config = tiny_config(norm="rmsnorm", kernel_backends={"rms_norm": "reference"})
    assert {module.backend for module in chosen(config).modules() if isinstance(module, norms.RMSNorm)} == {"reference"}


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_without_apex_the_log_says_why(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    lines = logged(caplog, tiny_config(norm=kind, **{f"{kind}_fusion": True}))
    reason = "apex runs on CUDA devices only, and this device is cpu"
    assert f"{kind}_fusion: {reason}. The norms are computed without apex." in lines


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"norm": "layernorm", "use_bias_in_norms": False}, "no layernorm with weights and without biases"),
        ({"norm": "layernorm"}, "the package apex is not installed"),
        ({"norm": "rmsnorm"}, "the package apex is not installed"),
    ],
)
def test_why_apex_cannot_compute_on_a_gpu(keys: dict[str, Any], reason: str) -> None:
    assert reason in str(reason_against_apex(tiny_config(**keys).model, "cuda"))


def test_an_apex_without_its_kernels_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex_norm, "find_spec", lambda name: None if name == "fused_layer_norm_cuda" else object())
    assert "built without its fused norms" in str(OP.status("cuda")["apex"])


def rms_forward_affine(x: Tensor, shape: Any, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """One inverse a row, flat."""
    assert tuple(shape) == weight.shape == x.shape[-1:]
    y, inverse = Reference().forward(x, weight, epsilon)
    return y, inverse.flatten()


def rms_backward_affine(grad: Tensor, inverse: Tensor, x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    """`more`: the shape, the weight, the epsilon, and whether x is the output."""
    shape, weight, _, memory_efficient = more
    assert inverse.shape == (x.numel() // x.shape[-1],)
    assert tuple(shape) == weight.shape
    assert grad.is_contiguous()
    assert not memory_efficient, "what is given is the input, not the output"
    return Reference().backward(grad, x, weight, inverse.view(x.shape[:-1]))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = types.ModuleType("fused_layer_norm_cuda")
    vars(compiled).update(rms_forward_affine=rms_forward_affine, rms_backward_affine=rms_backward_affine)
    python = types.ModuleType("apex.normalization.fused_layer_norm")
    vars(python).update(
        fused_layer_norm=lambda x, shape, epsilon: torch.layer_norm(x, shape, None, None, epsilon),
        fused_layer_norm_affine=lambda x, weight, bias, shape, epsilon: torch.layer_norm(x, shape, weight, bias, epsilon),
    )
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", compiled)
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", python)


@pytest.mark.parametrize("shapes", [((3, 2, 7), (7,)), ((0, 7), (7,)), ((2, 3, 5), (3, 5))], ids=str)
def test_apex_is_given_what_it_takes(shapes: tuple[tuple[int, ...], tuple[int, ...]], installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows, and several scales, never reach it."""
    x, scale = (torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True) for shape in shapes)
    wanted = rms_norm(x, scale, 1e-5, backend="reference")
    monkeypatch.setitem(OP._objects, ("apex", "cpu"), Apex())
    got = rms_norm(x, scale, 1e-5, backend="apex")
    torch.testing.assert_close(got, wanted)
    for ours, theirs in zip(torch.autograd.grad(got.sum(), (x, scale)), torch.autograd.grad(wanted.sum(), (x, scale)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["layernorm", "non_parametric_layernorm", "rmsnorm"])
def test_the_key_puts_apex_in_place(kind: str, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "reason_against_apex", lambda *_: None)
    monkeypatch.setitem(OP._objects, ("apex", "cpu"), Apex())
    config = tiny_config(norm=kind, **{f"{'rmsnorm' if kind == 'rmsnorm' else 'layernorm'}_fusion": True})
    model, plain, text = chosen(config), built(config), torch.arange(16)[None]
    found = [module for module in model.modules() if isinstance(module, (norms.RMSNorm, norms.LayerNorm))]
    assert found
    assert all(getattr(module, "backend", None) == "apex" or getattr(module, "function", None) is layer_norm for module in found)
    torch.testing.assert_close(model(text).logits_BSV, plain(text).logits_BSV)
