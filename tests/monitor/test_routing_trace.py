"""Trace files: what is written is read, files of format 1 still load, parts of several processes come together, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.monitor.routing_trace import Trace, TraceError, read_trace, write_trace
from megatron.monitor.trace_layers import LayerChoices, joined
from megatron.monitor.trace_parts import part_name, read_parts, read_whole, step_folder


def whole(**changes: Any) -> Trace:
    rng = np.random.default_rng(2)
    expert_TLK = rng.random((6, 2, 4)).argsort(-1)[..., :2]
    trace = Trace(
        np.array([0, 0, 1, 1, 2, 2]),
        [1, 3],
        expert_TLK,
        4,
        rng.integers(0, 3, (6, 2, 2, 1)),
        3,
        rng.random((6, 2, 2)).astype(np.float32),
        np.arange(6),
        np.array([0, 0, 0, 1, 1, 1]),
        np.array([0, 0, 0, 1, 1, 1]),
        ("prose", "code"),
        [4, 4],
        {0: "a", 5: "\ud800 é\x00"},
        "a model",
    )
    return trace._replace(**changes)


def check_same(one: Trace, other: Trace) -> None:
    for name in Trace._fields:
        first, second = getattr(one, name), getattr(other, name)
        same = (
            np.array_equal(first, second) if isinstance(first, np.ndarray) else list(first) == list(second) if name == "domains" else first == second
        )
        assert same, name


@pytest.mark.parametrize(
    "changes", [{}, {"lore_TLKM": None, "num_lores": 0}, {"weight_TLK": None, "token_T": None, "pieces": None, "sequence_T": None}]
)
def test_what_is_written_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    trace = whole(**changes)
    write_trace(tmp_path / "trace.npz", trace)
    check_same(trace, read_trace(tmp_path / "trace.npz"))
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_a_file_of_format_1_loads(tmp_path: Path) -> None:
    trace = whole()
    old = {
        "format": np.int64(1),
        "step_T": trace.step_T,
        "layer_L": np.array(trace.layers),
        "expert_TLK": trace.expert_TLK,
        "num_experts": np.int64(4),
    }
    np.savez(tmp_path / "old.npz", **old)
    read = read_trace(tmp_path / "old.npz")
    assert read.expert_TLK.tolist() == trace.expert_TLK.tolist()
    assert (read.token_T, read.domains, read.experts_by_layer, read.model) == (None, (), [4, 4], "")
    np.savez(tmp_path / "new.npz", **{**old, "format": np.int64(3)})
    with pytest.raises(TraceError, match="is no routing trace of this version"):
        read_trace(tmp_path / "new.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_L": [4, 3], "expert_TLK": np.full((6, 2, 2), 3)}, r"names expert 3 of layer 3, which has experts from 0 to 2 \(experts_L\)"),
        ({"lore_TLKM": np.full((6, 2, 2, 1), 3)}, r"names a LoRE outside of 0 to 2 \(num_lores\)"),
        ({"domain_T": np.full(6, 2)}, r"names a domain outside of 0 to 1 \(domains\)"),
        ({"token_T": np.arange(5)}, "its arrays missing or of another form"),
        ({"weight_TLK": np.zeros((6, 2, 3), np.float32)}, "its arrays missing or of another form"),
    ],
)
def test_arrays_that_do_not_belong_together(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.npz", whole(**changes))
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "trace.npz")


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "trace.npz").mkdir()
    with pytest.raises(TraceError, match=r"trace\.npz cannot be written"):
        write_trace(tmp_path / "trace.npz", whole())
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_replicas_follow_each_other_and_stages_stand_side_by_side(tmp_path: Path) -> None:
    trace = whole()
    for replica, rows in enumerate((slice(0, 3), slice(3, 6))):
        for stage in (0, 1):
            cut = {name: getattr(trace, name)[rows] for name in ("step_T", "token_T", "sequence_T", "domain_T")}
            cut |= {name: getattr(trace, name)[rows, stage : stage + 1] for name in ("expert_TLK", "lore_TLKM", "weight_TLK")}
            cut |= {"token_T": None, "pieces": None} if stage else {}
            part = trace._replace(**cut, layers=[trace.layers[stage]], experts_L=[4])
            write_trace(tmp_path / part_name(replica, stage), part)
    found = read_parts(tmp_path)
    assert found is not None
    for name in ("step_T", "layers", "expert_TLK", "lore_TLKM", "weight_TLK", "token_T", "pieces", "experts_L"):
        assert np.array_equal(getattr(found, name), getattr(trace, name)), name
    assert found.sequence_T is not None
    assert len(np.unique(found.sequence_T)) == 2
    (tmp_path / part_name(1, 1)).unlink()
    with pytest.raises(TraceError, match="do not hold the same tokens in every layer"):
        read_parts(tmp_path)


def test_the_ranks_of_megatron_core(tmp_path: Path) -> None:
    for rank in (0, 1):
        record = {"step": 0, "block": "decoder", "layer": 2, "rank": rank, "num_tokens": 2, "topk": 1, "top_indices": [[rank], [3]]}
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text(json.dumps(record) + "\n")
    found = read_parts(tmp_path, num_experts=8)
    assert found is not None
    assert found.expert_TLK[:, 0, 0].tolist() == [0, 3, 1, 3]
    assert found.num_experts == 8


def test_a_folder_of_steps_is_not_one_trace(tmp_path: Path) -> None:
    assert read_parts(tmp_path) is None
    with pytest.raises(TraceError, match="holds no parts of a trace"):
        read_whole(tmp_path)
    (tmp_path / step_folder(7)).mkdir()
    with pytest.raises(TraceError, match=r"holds a folder for each traced step\. Give one of them, such as .*step_00000007"):
        read_parts(tmp_path)


def test_choices_go_by_weight_and_layers_are_filled() -> None:
    wide = LayerChoices(np.array([[-1, 1, 2]]), np.array([[9.0, 0.25, 0.75]], np.float32), np.array([[[-1], [5], [6]]]))
    narrow = LayerChoices(np.array([[3, 0]]), np.array([[0.5, 0.5]], np.float32))
    found = joined([wide, narrow])
    assert found.expert_TLK.tolist() == [[[2, 1, -1], [3, 0, -1]]]
    assert found.weight_TLK.tolist() == [[[0.75, 0.25, 0], [0.5, 0.5, 0]]]
    assert found.lore_TLKU is not None
    assert found.lore_TLKU[0, :, :, 0].tolist() == [[6, 5, -1], [-1, -1, -1]]
