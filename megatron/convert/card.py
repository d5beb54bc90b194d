"""The model card of an export: what the model is, how large, how it was trained, how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron.config.size import count_parameters
from megatron.convert.architecture import Architecture, Source
from megatron.convert.opened import Opened

LOSSES = {"train/lm_loss": "training", "validation/lm_loss": "validation", "test/lm_loss": "test"}
STEPS = 50
"""Steps that the training loss is averaged over: one step's is noise."""
SHAPE_KEYS = ("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "seq_length", "norm", "pos_emb", "activation")
MOE_KEYS = ("moe_num_experts", "moe_top_k", "moe_router_type", "moe_expert_type")
LORE_KEYS = ("moe_num_lores", "moe_lore_top_k", "moe_lore_rank", "moe_lore_interaction")


def model_card(name: str, opened: Opened, architecture: Architecture, checked: str | None) -> str:
    """README.md of the export. `checked`: what the comparison of logits found; None when there was none."""
    trust = ", trust_remote_code=True" if architecture.code is not None else ""
    comparison = f"compared with the original: {checked}" if checked is not None else "not compared with the original"
    rows = "\n".join(f"| {key} | {value} |" for key, value in _facts(opened).items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {architecture.model_type}
- {"mixture-of-experts" if opened.source.config.moe.has_experts else "dense"}
---

# {name}

Trained with StructMoE-NeoX and exported as `{architecture.class_name}`; {comparison}.

| | |
|---|---|
{rows}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
inputs = tokenizer("The state of the Union", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

## Configuration

```json
{json.dumps(_given(opened.source), indent=2)}
```
"""


def _facts(opened: Opened) -> dict[str, Any]:
    model, moe = opened.source.config.model, opened.source.config.moe
    count = count_parameters(model, moe, opened.source.vocabulary)
    facts: dict[str, Any] = {"parameters": f"{count.total_sum:,}"}
    if moe.has_experts:
        facts["parameters that a token meets"] = f"{count.active_sum:,}"
    facts |= {key: getattr(model, key) for key in SHAPE_KEYS if getattr(model, key) is not None}
    if moe.has_experts:
        keys = MOE_KEYS + (LORE_KEYS if moe.moe_expert_type == "structmoe" else ())
        facts |= {key: getattr(moe, key) for key in keys}
    iteration = opened.weights.client_state.get("iteration")
    if isinstance(iteration, int):
        facts["training steps"] = f"{iteration:,}"
    tokens = (opened.weights.client_state.get("training_state") or {}).get("consumed_tokens")
    if tokens:
        facts["training tokens"] = f"{tokens:,}"
    return facts | {f"{name} loss (nats per token)": f"{loss:.4f}" for name, loss in _losses(opened.path.parent, iteration).items()}


def _losses(run: Path, iteration: Any) -> dict[str, float]:
    """Losses up to a step in the run's metrics.jsonl, where that lies beside the checkpoint: in training the mean of STEPS, else the last."""
    losses: dict[str, list[float]] = {}
    file = run / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.is_file() and isinstance(iteration, int) else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line a killed run was writing
        if record.get("iteration", 0) <= iteration:
            for key, name in LOSSES.items():
                if isinstance(record.get(key), float):
                    losses.setdefault(name, []).append(record[key])
    return {name: fmean(values[-STEPS:] if name == "training" else values[-1:]) for name, values in losses.items()}


def _given(source: Source) -> dict[str, Any]:
    """What was chosen of the model's keys: those that are not the default."""
    sections = (source.config.model, source.config.moe)
    return {key: value for section in sections for key, value in section.model_dump(mode="json", exclude_defaults=True).items()}
