"""A configuration survives the way through a command-line argument."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.loader import load_config
from megatron.config.section import ConfigError
from megatron.config.transport import decode, encode

TEXT = """num_layers: 2
hidden_size: 64
num_attention_heads: 4
seq_length: 32
max_position_embeddings: 32
optimizer: {type: Adam, params: {lr: 1e-3, betas: [0.9, 0.95]}}
zero_optimization: {stage: 1, reduce_bucket_size: 5e8}
fp16: {enabled: true}
rope_fusion: true   # é
prompt_end: "\\n"
"""


def test_round_trip(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(TEXT)
    loaded = load_config(["a"], ["seed=5", "moe_losses.z_loss=1e-3"], conf_dir=tmp_path)
    argument = encode(loaded)
    again = decode(argument)
    assert again == loaded
    assert again.config.given() == loaded.config.given()
    assert again.config.flat() == loaded.config.flat()
    assert argument.isascii()
    assert not set(argument) & set(" '\"$")


@pytest.mark.parametrize("text", ["", "!!", "aGVsbG8=", "héé"])
def test_what_deepy_did_not_write_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"the value of --megatron_config was not written by deepy.py; start the script with deepy.py, or give it YAML files"
    ):
        decode(text)
