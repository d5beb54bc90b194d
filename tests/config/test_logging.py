"""What is wrong with the logging keys is a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.loader import config_from_dict
from megatron.config.section import ConfigError

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"profile": True}, "'profile' = true: needs tensorboard_dir or log_dir: the trace is written there"),
    (
        {"memory_profiling": True},
        "'memory_profiling' = true: needs memory_profiling_path, tensorboard_dir or log_dir: it is written there",
    ),
    (
        {"profile": True, "log_dir": "logs", "profile_step_start": 20},
        "'profile_step_stop' = 12 (default): must be more than profile_step_start (20)",
    ),
    ({"gradient_noise_scale_n_batches": 1}, "'gradient_noise_scale_n_batches' = 1: must be at least 2"),
    ({"comet_tags": "red"}, "'comet_tags' = 'red': must be a list; write [red]"),
    ({"use_wandb": "yes"}, "'use_wandb' = 'yes': must be true or false"),
]


@pytest.mark.parametrize(("keys", "sentence"), CASES, ids=[sentence.split("'")[1] for _, sentence in CASES])
def test_what_does_not_fit_is_a_sentence(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_from_dict({**MODEL, **keys})
    assert raised.value.problems == [sentence]


def test_where_profiles_go() -> None:
    both = config_from_dict({**MODEL, "profile": True, "tensorboard_dir": "tb", "log_dir": "logs"})
    assert both.logging.trace_dir == "tb"
    assert config_from_dict({**MODEL, "profile": True, "log_dir": "logs"}).logging.trace_dir == "logs"
    assert config_from_dict({**MODEL, "profile_step_start": 20}), "nothing is profiled"
