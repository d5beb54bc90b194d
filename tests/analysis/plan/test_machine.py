"""Machines and their links."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.analysis.plan.efficiency import LINK_SHARE
from megatron.analysis.plan.machine import MACHINES, PlanError, load_machine, machine_names


def test_every_machine_loads_and_names_its_source() -> None:
    assert machine_names() == ["a100-80gb", "h100-80gb", "h200-141gb"]
    for name in machine_names():
        assert load_machine(name).name == name
        assert "data sheet" in (MACHINES / f"{name}.yml").read_text(encoding="utf-8")


def test_links_inside_a_node_between_nodes_and_of_one_process() -> None:
    machine = load_machine("h100-80gb")
    gigabyte, inside, port = 1e9, 450e9 * LINK_SHARE, 50e9 * LINK_SHARE
    assert machine.seconds("allreduce_", gigabyte, [3]) == 0
    assert machine.seconds("allreduce_", gigabyte, range(8)) == pytest.approx(2 * 7 / 8 * gigabyte / inside, rel=0.02)
    assert machine.seconds("allgather_", gigabyte, range(16)) == pytest.approx(15 / 16 * gigabyte / (8 * port), rel=0.05)
    assert machine.seconds("allreduce_", gigabyte, [0, 8]) == pytest.approx(gigabyte / port, rel=0.02)
    assert machine.seconds("alltoall_base_", gigabyte, range(16)) == pytest.approx(gigabyte / 2 / port, rel=0.02)
    once = machine.seconds("alltoall_base_", gigabyte, range(16), 8)
    assert once == pytest.approx(gigabyte / 8 * (1 - 0.5**8) / port, rel=0.1)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="known: a100-80gb, h100-80gb, h200-141gb"):
        load_machine("b300")
    own = tmp_path / "own.yml"
    own.write_text("name: own\n7: 1\n", encoding="utf-8")
    with pytest.raises(PlanError, match=r"must have exactly the keys name, bf16_tflops, .* \(missing: bf16_tflops, .*gpus_per_node; unknown: 7\)"):
        load_machine(str(own))
    text = (MACHINES / "h100-80gb.yml").read_text(encoding="utf-8")
    own.write_text(text.replace("bf16_tflops: 989", "bf16_tflops: -1"), encoding="utf-8")
    with pytest.raises(PlanError, match="'bf16_tflops' = -1: must be a number above 0"):
        load_machine(str(own))
    own.write_text(text.replace("memory_gib: 79.1", "memory_gib: .inf"), encoding="utf-8")
    with pytest.raises(PlanError, match="'memory_gib' = inf: must be a number above 0"):
        load_machine(str(own))
    own.write_text(text, encoding="utf-8")
    assert load_machine(str(own), 4).gpus_per_node == 4
    own.write_text("{", encoding="utf-8")
    with pytest.raises(PlanError, match="is not YAML"):
        load_machine(str(own))
