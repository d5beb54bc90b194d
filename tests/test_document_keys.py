"""What the documents show of configurations is accepted: every `key: value` in backticks, every YAML block, every default that a docstring names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config import config_from_dict
from megatron.config.neox import OWNER
from megatron.config.section import ConfigError

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "configs/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
YAML_BLOCK = re.compile(r"^ *```yaml\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"`([a-z][a-z0-9_]*)((?:\.[a-z0-9_]+)*): ([^`\n]+)`")
MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32, "load": "runs/a"}
EXPERTS = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk"}
SHARED = {"moe_num_shared_experts": 1}
LORES = {"moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_rank": 2, "activation": "swiglu"}
FORMULA = re.compile(r"\b[A-Za-z]\b")
"""A letter that stands for a number: the value shows a form, such as `moe_expert_segments: m`."""
REFUSED = {"data_impl: cached", "train_iters: 1e5", "moe_losses: {name: coefficient}"}
"""What a document names as refused, or shows the form of."""
PLUGIN = "my_router"


def fits(keys: dict[str, Any]) -> str | None:
    """None when a model, a mixture of experts or a StructMoE takes the keys, else why the last does not."""
    reason = ""
    for base in (
        MODEL,
        {**MODEL, **EXPERTS},
        {**MODEL, **EXPERTS, **SHARED},
        {**MODEL, **EXPERTS, **LORES},
        {**MODEL, **EXPERTS, "checkpoint_factor": 1000},
    ):
        try:
            config_from_dict({**base, **keys})
        except ConfigError as error:
            reason = str(error)
        else:
            return None
    return reason


def shown_in(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(as it is written, the keys that it gives) of every `key: value` whose key is one of ours."""
    found = []
    for key, inner, value in SHOWN.findall(text):
        if key in OWNER and (shown := f"{key}{inner}: {value}") not in REFUSED and FORMULA.search(value) is None:
            content = yaml.safe_load(value)
            for part in reversed(inner.split(".")[1:]):
                content = {part: content}
            found.append((shown, {key: content}))
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_shows_is_accepted(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    refused = {shown: reason for shown, keys in shown_in(text) if (reason := fits(keys)) is not None}
    for block in YAML_BLOCK.findall(text):
        if PLUGIN not in block and (reason := fits(yaml.safe_load(block))) is not None:
            refused[block] = reason
    assert refused == {}


def test_the_search_finds_what_is_refused() -> None:
    (shown, keys), nested = shown_in("Set `train_iters: many`, `a word: x` and `zero_optimization.stage: 1`.")
    assert shown == "train_iters: many"
    assert "must be a whole number" in str(fits(keys))
    assert nested == ("zero_optimization.stage: 1", {"zero_optimization": {"stage": 1}})
    assert fits(nested[1]) is None
