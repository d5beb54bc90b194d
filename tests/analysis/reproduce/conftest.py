"""A protocol that runs in seconds: two arms, one layer, a text of a few kilobytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.analysis.reproduce.protocol import PROTOCOL, Protocol, load_protocol

ROOT = Path(__file__).resolve().parents[3]
SENTENCE = "The committee of the house met on day {0} and spoke about {1} roads, {2} ships and the price of corn in the year {3}.\n"


@pytest.fixture
def toy(tmp_path: Path) -> dict[str, Any]:
    """The committed protocol, made small."""
    values: dict[str, Any] = yaml.safe_load((ROOT / PROTOCOL).read_text(encoding="utf-8"))
    text = tmp_path / "text.txt"
    text.write_text("".join(SENTENCE.format(n, n % 7, n % 11, 1800 + n % 97) for n in range(300)))
    values["common"] |= {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16, "max_position_embeddings": 16}
    values["common"]["train_micro_batch_size_per_gpu"] = 2
    values["domains"] = {"toy": {"corpus": str(text), "text": "sentences", "vocabulary": 280}}
    values["tuning"] |= {"domain": "toy", "lowest": 0.006, "highest": 0.012}
    values["measure"] |= {"test_tokens": 128, "validation_tokens": 64, "curve_tokens": 64, "curve_points": 4, "routing_tokens": 64}
    for name, arm in values["arms"].items():
        arm["group"] = "core" if name in ("structmoe", "moe-9") else "later"
        arm.pop("as_large_as", None)
    tier = {"steps": 8, "seeds": [1, 2], "groups": {"core": ["toy"]}, "tuning": {"core": {"steps": 2, "rates": [0.006, 0.012]}}}
    values["tiers"] = {"full": tier, "quick": {**tier, "tuning": {}}}
    return values


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a protocol to a file."""

    def store(values: dict[str, Any]) -> Path:
        path = tmp_path / "protocol.yml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return store


@pytest.fixture
def protocol(toy: dict[str, Any], stored: Callable[[dict[str, Any]], Path]) -> Protocol:
    return load_protocol(stored(toy))
