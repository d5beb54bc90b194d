"""Settings in a config.json that its class does not read: they change nothing in transformers, so nothing here, and a sentence says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.convert.errors import ConversionError

UNREAD = (
    "attention_bias",
    "clip_qkv",
    "decoder_sparse_step",
    "mlp_bias",
    "mlp_only_layers",
    "norm_topk_prob",
    "qkv_bias",
    "routed_scaling_factor",
    "router_jitter_noise",
    "use_qk_norm",
    "use_sliding_window",
)
"""Settings that tables read for the classes which know them, and that the other classes do not look at."""
MEANINGFUL = (
    *UNREAD,
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "no_rope_layers",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rope_interleave",
    "scoring_func",
    "sliding_window",
)
"""Settings that change what other classes compute: whoever wrote one may believe that it does so here."""


def without_unread(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without what the class does not read. `known`: the settings that the class has."""
    return {key: value for key, value in settings.items() if key in known or key not in UNREAD}


def check_general(settings: Mapping[str, Any], known: Mapping[str, Any], file: Path) -> None:
    """Raises ConversionError for settings that transformers obeys in every class, through its masks and caches, and that no model here has."""
    if settings.get("is_causal") is False:
        raise ConversionError(f"{file}: is_causal: false cannot be represented, because here a token never sees later tokens.")
    kinds = set(settings.get("layer_types") or ())
    if "layer_types" not in known and kinds - {"full_attention"}:
        raise ConversionError(
            f"{file}: layer_types: {', '.join(sorted(map(str, kinds)))} cannot be represented, because here all layers are full_attention."
        )


def unread_settings(given: Mapping[str, Any], known: Mapping[str, Any], class_name: str) -> Iterator[str]:
    """A sentence for each setting of config.json that would matter elsewhere and that the class does not read."""
    for key in MEANINGFUL:
        if given.get(key) not in (None, False, [], 1.0) and key not in known and key not in (known.get("rope_parameters") or {}):
            yield (
                f"config.json says {key}: {given[key]}. {class_name} does not read this setting, so it has no effect in transformers, and none here."
            )
