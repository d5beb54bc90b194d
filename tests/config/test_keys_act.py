"""Every accepted key acts: somewhere outside the sections, something reads it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from megatron.config.deepspeed import DeepSpeedConfig
from megatron.config.neox import OWNER, SECTION_CLASSES

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("deepy.py", "train.py", "generate.py", "eval.py", "prepare_data.py")
# Read by the section itself, through a property or method that others use; or by a rule only, because just one value is allowed.
THROUGH_THE_SECTION = {
    "num_kv_heads": "kv_heads",
    "deepspeed_slurm": r"launcher\.program",
    "model_parallel_size": "layout",
    "moe_expert_parallel_size": "layout",
    "pipe_parallel_size": "layout",
    "head_dim": "head_width",
    "add_qkv_bias": "has_qkv_bias",
    "intermediate_size": "mlp_width",
    "mlp_multiple_of": "mlp_width",
    "ffn_hidden_size": "mlp_width",
    "expansion_factor": "mlp_width",
    "activation": "hidden_function",
    "bias_gelu_fusion": "hidden_function",
    "rotary_pct": "rotary_dim",
    "attention_config": "attention_types",
    "apply_query_key_layer_scaling": "position_bias_coefficient",
    "reordered_norm": "residual",
    "moe_num_experts": "num_experts",
    "moe_num_experts_by_layer": "for_layers",
    "moe_top_k": "top_k",
    "moe_expert_segments": "num_experts",
    "moe_ffn_hidden_size": "expert_width",
    "moe_expert_interval": "for_layers",
    "moe_first_k_dense_layers": "for_layers",
    "moe_layers": "for_layers",
    "moe_num_shared_experts": "shared_width",
    "moe_shared_expert_intermediate_size": "shared_width",
    "moe_decomposition_rank": "decomposition_rank",
    "moe_decomposition_fraction": "decomposition_rank",
    "lr_decay_fraction": "lr_decay_iters",
    "train_batch_size": "resolve_batch",
    "use_bnb_optimizer": "optimizer_type",
    "partition_activations": "divides_kept_inputs",
    "checkpoint_in_cpu": "keeps_inputs_on_cpu",
    "activation_checkpointing": "keeps_inputs_on_cpu",
}
ONE_VALUE_ONLY = {"data_impl"}
THROUGH_THE_SECTION |= dict.fromkeys(DeepSpeedConfig.model_fields, r"deepspeed\.settings")
BEFORE_THE_SECTIONS = {"plugins"}  # imported by the loader, tested in test_loader.py


@cache
def _readers() -> dict[Path, str]:
    paths = [*(ROOT / "megatron").rglob("*.py"), *(ROOT / name for name in SCRIPTS if (ROOT / name).exists())]
    return {path: path.read_text() for path in paths if path.name not in ("aliases.py", "reference.py", "neox_arguments.py")}


@pytest.mark.parametrize("key", list(OWNER))
def test_a_key_is_read(key: str) -> None:
    if key in ONE_VALUE_ONLY | BEFORE_THE_SECTIONS:
        return
    definition = ROOT / (SECTION_CLASSES[OWNER[key]].__module__.replace(".", "/") + ".py")
    per_subset = re.fullmatch(r"(?:train|valid|test)_(data_paths|label_data_paths|data_weights)", key)
    name = re.escape(f"}}_{per_subset[1]}") if per_subset else rf"\b{THROUGH_THE_SECTION[key]}" if key in THROUGH_THE_SECTION else rf"\.{key}"
    literal = "" if key in THROUGH_THE_SECTION else per_subset[1] if per_subset else f".{key}"  # tried first: it is found much sooner than a pattern
    readers = [path for path, text in _readers().items() if path != definition and literal in text and re.search(rf"{name}\b", text)]
    assert readers, f"nothing reads '{key}' of the section '{OWNER[key]}'"
