"""What `--check` says of implementations, and what it refuses in `kernel_backends`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config.loader import load_config
from megatron.config.neox import NeoXConfig
from megatron.config.section import ConfigError
from megatron.kernels.backends import OPS
from megatron.launcher.implementations import check_backends, implementations
from megatron.testing.tiny import tiny_config

EXPERTS = {"moe_num_experts": 4, "moe_router_type": "topk"}
CPU_ONLY = "runs on CUDA devices only, and this device is cpu"


def shown(config: NeoXConfig, device: str = "cpu") -> dict[str, tuple[str, str]]:
    return {choice.part: (choice.runs, choice.because) for choice in implementations(config, device)}


def test_a_dense_model_has_no_ops_of_experts() -> None:
    dense = shown(tiny_config(moe_num_experts=1, moe_top_k=1))
    assert set(dense) == {"attention", "linear_cross_entropy", "optimizer"}
    more = shown(tiny_config(**EXPERTS))
    assert set(more) == set(dense) | {"grouped_gemm", "grouped_lore", "permute", "route"}
    for part in set(more) & set(OPS) - {"attention"}:
        assert more[part][0] == OPS[part].choose("auto", "cpu")


@pytest.mark.parametrize(
    ("keys", "part", "runs", "why"),
    [
        ({"attention_config": [[["flash"], "all"]]}, "attention", None, f"flash_attn {CPU_ONLY}"),
        ({"sliding_window_width": 3}, "attention", "PyTorch's SDPA", "has no sliding windows"),
        ({"pos_emb": "alibi"}, "attention", "PyTorch's SDPA", "adds no biases to scores (pos_emb: alibi)"),
        ({"attention_dropout": 0.1}, "attention", "PyTorch's SDPA", "has no dropout"),
        ({"reset_attention_mask": True}, "attention", "PyTorch's SDPA", "reset_attention_mask"),
        ({"precision": "fp16"}, "attention", "PyTorch's SDPA", "and this model is in float16"),
        ({"kernel_backends": {"attention": "torch"}}, "attention", "PyTorch's SDPA", "kernel_backends names it"),
        ({"norm": "layernorm", "layernorm_fusion": True}, "layernorm", "PyTorch", f"layernorm_fusion: apex {CPU_ONLY}"),
        ({"norm": "rmsnorm", "rmsnorm_fusion": True}, "rms_norm", None, f"rmsnorm_fusion: apex {CPU_ONLY}"),
        ({"kernel_backends": {"grouped_lore": "torch"}, **EXPERTS}, "grouped_lore", "torch", "kernel_backends names it"),
        ({"moe_expert_parallel_size": 2, **EXPERTS}, "dispatch", "reference", ""),
        ({"optimizer": {"type": "SGD"}}, "optimizer", "SGD of PyTorch", ""),
        ({"optimizer": {"type": "Lion"}}, "optimizer", "Lion of this program", ""),
        ({"optimizer": {"type": "Adam", "implementation": "apex"}}, "optimizer", "none", "apex runs on CUDA only"),
        ({"zero_optimization": {"stage": 1}}, "optimizer", "Adam of PyTorch", "only at ZeRO stage 0, and this is stage 1"),
    ],
)
def test_the_reason_is_said(keys: dict[str, Any], part: str, runs: str | None, why: str) -> None:
    if why.startswith(("has no", "adds no", "and this")) and OPS["attention"].status("cpu")["compiled"] is not None:
        pytest.skip(f"compiled attention: {OPS['attention'].status('cpu')['compiled']}")
    got = shown(tiny_config(**keys))[part]
    assert why in got[1]
    assert runs in (None, got[0])


def test_what_is_not_installed_on_a_gpu_is_said() -> None:
    config = tiny_config(norm="layernorm", layernorm_fusion=True, attention_config=[[["flash"], "all"]], precision="bfloat16")
    gpu = shown(config, "cuda")
    assert gpu["attention"] == ("PyTorch's SDPA", "flash_attn is not installed (pip install flash-attn)")
    assert gpu["layernorm"] == ("PyTorch", "layernorm_fusion: the package apex is not installed (NVIDIA's, built with --cuda_ext)")


def loaded_from(folder: Path, backends: str, hidden_size: int = 8) -> Any:
    (folder / "a.yml").write_text(
        f"num_layers: 2\nhidden_size: {hidden_size}\nnum_attention_heads: 2\nseq_length: 8\nmax_position_embeddings: 8\nkernel_backends:\n{backends}"
    )
    return load_config(["a.yml"], conf_dir=folder)


def test_everything_that_is_wrong_with_the_entries(tmp_path: Path) -> None:
    loaded = loaded_from(tmp_path, "  grouped_gem: auto\n  permute: referense\n  route: reference\n  grouped_gemm: triton\n")
    with pytest.raises(ConfigError) as caught:
        check_backends(loaded, "cpu")
    first, second, third = caught.value.problems
    assert first.startswith(f"{tmp_path / 'a.yml'}:7: 'kernel_backends.grouped_gem': there is no op 'grouped_gem'; known: ")
    assert second.startswith(f"{tmp_path / 'a.yml'}:8: 'kernel_backends.permute': there is no implementation 'referense'; known: auto, ")
    assert third.startswith(f"{tmp_path / 'a.yml'}:10: 'kernel_backends.grouped_gemm': 'triton' cannot run on cpu (triton: runs on cuda only); use ")


def test_the_package_that_sends_rows_is_refused_on_a_cpu_and_where_it_is_not_installed(tmp_path: Path) -> None:
    keys = "  dispatch: deep_ep\nmoe_num_experts: 4\nmoe_expert_parallel_size: 2\nprecision: bfloat16\n"
    loaded = loaded_from(tmp_path, keys, hidden_size=256)
    cannot = f"{tmp_path / 'a.yml'}:7: 'kernel_backends.dispatch': 'deep_ep' cannot run on "
    for device, reason in (
        ("cpu", "runs on cuda only"),
        ("cuda", "the package deep_ep is not installed; its page github.com/deepseek-ai/DeepEP says "),
    ):
        with pytest.raises(ConfigError) as caught:
            check_backends(loaded, device)
        assert caught.value.problems[0].startswith(f"{cannot}{device} (deep_ep: {reason}"), caught.value
        assert caught.value.problems[0].endswith("); use reference")


def test_for_other_machines_only_the_names_are_checked(tmp_path: Path) -> None:
    check_backends(loaded_from(tmp_path, "  grouped_gemm: triton\n"), None)
    with pytest.raises(ConfigError, match="there is no implementation 'trition'"):
        check_backends(loaded_from(tmp_path, "  grouped_gemm: trition\n"), None)
