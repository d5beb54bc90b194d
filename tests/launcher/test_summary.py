"""The tables of `deepy.py --check`."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from megatron.analysis.vocabulary import Vocabulary
from megatron.config.loader import load_values
from megatron.config.size import flops_per_token
from megatron.launcher.summary import summary
from megatron.testing.tiny import TINY_DENSE


def flops_shown(**values: Any) -> float:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(*summary(load_values({**TINY_DENSE, **values}), 1, Vocabulary(128, ""), "cpu"), sep="\n")
    lines = [line.split() for line in console.export_text().splitlines()]
    return float(next(line[-1] for line in lines if line[:3] == ["FLOPs", "per", "token"]))


def test_what_is_recomputed_is_counted() -> None:
    config = load_values(TINY_DENSE).config
    forward = flops_per_token(config.model, config.moe, 128) / 3
    assert flops_shown() == pytest.approx(3 * forward, rel=1e-3)
    assert flops_shown(checkpoint_activations=True) == pytest.approx(4 * forward, rel=1e-3)
    modules = flops_per_token(config.model, config.moe, 128, modules=["attention"])
    assert 3.1 * forward < modules < 3.9 * forward
    assert flops_shown(recompute_modules=["attention"]) == pytest.approx(modules, rel=1e-3)
