"""What a checkpoint holds of the data, and what is said when it is other data later."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.changed import changed_keys, changes, data_facts
from megatron.data.indexed import IndexedDatasetWriter
from megatron.data.loader import SamplePlan, build_data

PLAN = SamplePlan(train_samples=8, valid_samples=4, test_samples=0)


def facts(config: Any, seed: int = 1) -> dict[str, Any]:
    """As they come back from a file."""
    return dict(json.loads(json.dumps(data_facts(config, build_data(config, seq_length=4, plan=PLAN, seed=1), {"seed": seed}))))


def rewrite(path: Path, documents: list[list[int]]) -> None:
    with IndexedDatasetWriter(path, np.dtype("<u2")) as writer:
        for document in documents:
            writer.add(document)


def test_the_same_data_is_no_change(numbered: Callable[..., Path], data_config: Callable[..., Any]) -> None:
    config = data_config(data_path=str(numbered([10] * 10)), split="8,2,0")
    assert changes(facts(config), facts(config)) == []
    assert changes(facts(config), facts(config, seed=2)) == ["seed was 1 and is 2"]


def test_what_changed_in_one_file_is_said_once(numbered: Callable[..., Path], data_config: Callable[..., Any]) -> None:
    path = numbered([10] * 10)
    config = data_config(data_path=str(path), split="8,2,0")
    before = facts(config)
    os.utime(f"{path}.bin", ns=(1, 1))
    assert changes(before, facts(config)) == [f"{path} was written again since, with the same documents and the same beginning and end"]
    rewrite(path, [[7] * 10] * 10)
    assert changes(before, facts(config)) == [f"{path} has other content (with the same numbers of documents and tokens)"]
    rewrite(path, [[7] * 10] * 12)
    assert changes(before, facts(config)) == [f"{path} has other content (before 10 documents, now 12; before 100 tokens, now 120)"]
    rewrite(path, [list(range(10 * number, 10 * number + 10)) for number in range(10)])
    assert changes(before, facts(data_config(data_path=str(path), split="7,3,0")))[0] == "split was '8,2,0' and is '7,3,0'"


def test_other_files_and_weights(numbered: Callable[..., Path], data_config: Callable[..., Any]) -> None:
    one, copy, three = (str(numbered(sizes, name)) for name, sizes in (("one", [30, 40]), ("copy", [30, 40]), ("three", [50, 60])))

    def keys(*paths: str, **more: Any) -> Any:
        return data_config(train_data_paths=list(paths), valid_data_paths=[one], test_data_paths=[one], **more)

    before = facts(keys(one, three))
    assert changes(before, facts(keys(copy, three))) == [f"{one} is replaced by {copy}, which holds the same documents"]
    assert changes(before, facts(keys(three, one)))[:2] == [
        f"{one} is replaced by {three}",
        f"{three} has other content (before 70 tokens, now 110)",
    ]
    assert changes(before, facts(keys(one))) == [f"the training data was {one}, {three} and is {one}"]
    weighted = changes(before, facts(keys(one, three, train_data_weights=[1.0, 3.0])))
    assert weighted == ["train_data_weights was None and is [1.0, 3.0]"]


def test_a_checkpoint_without_facts_is_compared_by_its_keys(data_config: Callable[..., Any]) -> None:
    stored = {"data_path": "data/a", "split": "969, 30, 1", "hidden_size": 8}
    assert changed_keys(stored, data_config(data_path="data/b")) == ["data_path was 'data/a' and is 'data/b'"]
    assert changed_keys({}, data_config(data_path="data/b")) == []
