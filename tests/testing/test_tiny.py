"""The tiny configurations load, differ in what their names say, and take overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megatron.config import ConfigError
from megatron.testing.tiny import TINY_DENSE, TINY_MOE, TINY_STRUCTMOE, tiny_config


@pytest.mark.parametrize(("base", "experts", "kind"), [(TINY_DENSE, 1, "grouped"), (TINY_MOE, 4, "grouped"), (TINY_STRUCTMOE, 4, "structmoe")])
def test_each_base_loads(base: Mapping[str, Any], experts: int, kind: str) -> None:
    config = tiny_config(base)
    assert (config.moe.moe_num_experts, config.moe.moe_expert_type) == (experts, kind)
    assert config.model.hidden_size == 32


def test_overrides_win_and_none_takes_a_key_away() -> None:
    config = tiny_config(TINY_MOE, hidden_size=64, intermediate_size=None)
    assert config.model.hidden_size == 64
    assert config.model.intermediate_size is None


def test_the_bases_cannot_be_changed_by_a_test() -> None:
    with pytest.raises(TypeError):
        TINY_DENSE["hidden_size"] = 64  # type: ignore[index]


def test_a_wrong_override_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_sise"):
        tiny_config(hidden_sise=64)
