"""`split` has one rule: what --check refuses, the run refuses with the same words."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config import config_from_dict
from megatron.config.section import ConfigError
from megatron.config.split import SPLIT_RULE
from megatron.data.indexed import DatasetError
from megatron.data.split import parse_split

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        ("969, 30, 1", (969, 30, 1)),
        ("1,0,0", (1, 0, 0)),
        ("100", (100, 0, 0)),
        ("0.9,0.1,0", (0.9, 0.1, 0)),
        (" 8 / 2 ", (8, 2, 0)),
        ("1,1", (1, 1, 0)),
    ],
)
def test_both_read_it_alike(split: str, shares: tuple[float, float, float]) -> None:
    assert parse_split(split) == shares
    config_from_dict({**MODEL, "split": split})


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "0,50,50", "nan", "inf,1", "969,30,1,", "969,,1", "8/2,1", "969 30 1"])
def test_both_refuse_it_with_the_same_words(split: str) -> None:
    with pytest.raises(DatasetError) as run:
        parse_split(split)
    with pytest.raises(ConfigError) as check:
        config_from_dict({**MODEL, "split": split})
    assert str(run.value) == f"split = {split!r}: {SPLIT_RULE}"
    assert [problem.endswith(SPLIT_RULE) for problem in check.value.problems] == [True]


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        (
            "data/a,data/b",
            "names one corpus; for several corpora write train_data_paths: [data/a, data/b], and valid_data_paths and test_data_paths too",
        ),
        ("data/a, data/b", "names one corpus; for several corpora write train_data_paths: [data/a, data/b], and"),
        ("0.3 data/a 0.7 data/b", "for several corpora write train_data_paths: [data/a, data/b] and train_data_weights: [0.3, 0.7], and"),
        ("30,data/a,70,data/b", "for several corpora write train_data_paths: [data/a, data/b] and train_data_weights: [30, 70], and"),
    ],
)
def test_several_corpora_under_data_path_are_told_where_to_go(path: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**MODEL, "data_path": path})
    assert advice in caught.value.problems[0]


def test_a_path_with_a_comma_or_a_space_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a,b.idx").write_text("")
    for path in (f"{tmp_path}/a,b", "my data/a b", "one corpus"):
        config_from_dict({**MODEL, "data_path": path})


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"data_path": ["a", "b"]}, "'data_path' = ['a', 'b']: must be text; for several corpora write train_data_paths: [a, b]"),
        ({"train_data_paths": "a, b"}, "'train_data_paths' = 'a, b': must be a list; write [a, b]"),
        ({"train_data_paths": ["a,b"]}, "'a,b' names one corpus; write one entry for each corpus: [a, b]"),
        ({"train_data_paths": ["0.5", "a"]}, "holds the number 0.5 but takes paths only; write weights in train_data_weights"),
        ({"split": [969, 30, 1]}, "'split' = [969, 30, 1]: must be text: write '969, 30, 1'"),
    ],
)
def test_lists_where_text_is_wanted_and_the_other_way_round(keys: dict[str, object], advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**MODEL, **({"valid_data_paths": ["v"], "test_data_paths": ["t"]} if "train_data_paths" in keys else {}), **keys})
    assert any(advice in problem for problem in caught.value.problems), caught.value.problems
