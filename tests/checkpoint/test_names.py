"""Old names of weights."""

from __future__ import annotations

import pytest
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.names import modern_names

ONES = torch.ones(2)


def test_todays_names_stay() -> None:
    names = ["sequential.2.mlp.linear1.weight", "sequential.2.mlp.experts.mlp.w1", "sequential.2.mlp.experts.mlp.w3", "sequential.5.norm.scale"]
    named = modern_names(dict.fromkeys(names, ONES))
    assert (list(named.state), named.translated, named.left_out) == (names, (), ())


def test_names_before_september_2024() -> None:
    stored = {
        "module.sequential.2.mlp.dense_h_to_4h.weight": ONES,
        "module.module.sequential.2.mlp.dense_4h_to_h.bias": ONES,
        "sequential.2.attention.rotary_emb.inv_freq": ONES,
        "sequential.3.attention.rotary_emb.inv_freq": ONES,
        "sequential.3.attention.alibi_embed.slopes": ONES,
    }
    named = modern_names(stored)
    assert list(named.state) == ["sequential.2.mlp.linear1.weight", "sequential.2.mlp.linear2.bias"]
    assert named.translated == ("module. -> nothing", "mlp.dense_h_to_4h -> mlp.linear1", "mlp.dense_4h_to_h -> mlp.linear2")
    assert named.left_out == ("rotary_emb.inv_freq", "alibi_embed.slopes")


def test_a_llamas_w1_is_the_gate() -> None:
    stored = {f"sequential.2.mlp.w{number}.weight": torch.full((2, 3), float(number)) for number in (1, 2, 3)}
    named = modern_names(stored)
    assert named.state["sequential.2.mlp.linear1.weight"][:, 0].tolist() == [3, 3, 1, 1], "[up ; gate]"
    assert named.state["sequential.2.mlp.linear2.weight"].tolist() == stored["sequential.2.mlp.w2.weight"].tolist()
    assert set(named.state) == {"sequential.2.mlp.linear1.weight", "sequential.2.mlp.linear2.weight"}
    assert named.translated == ("mlp.w2 -> mlp.linear2", "mlp.w3 and mlp.w1 -> mlp.linear1")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["s.2.mlp.dense_h_to_4h.weight", "s.2.mlp.linear1.weight"], "s.2.mlp.linear1.weight, but only one of them can be the weight"),
        (["s.2.mlp.w1.weight"], "holds s.2.mlp.w1.weight but not s.2.mlp.w3.weight; a gated MLP has both"),
        (["s.2.mlp.w3.weight"], "holds s.2.mlp.w3.weight but not s.2.mlp.w1.weight"),
        (["s.2.mlp.w1.weight", "s.2.mlp.w3.weight", "s.2.mlp.linear1.weight"], "holds both s.2.mlp.w1.weight and s.2.mlp.linear1.weight"),
    ],
)
def test_names_that_contradict_each_other(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        modern_names(dict.fromkeys(names, ONES))
