"""Choosing an implementation: by order, by name, and with the reason where it cannot be."""

from __future__ import annotations

import pytest

from megatron.kernels.backends import OPS, Choice, choose, choose_backends
from megatron.kernels.registry import Implementation, KernelUnavailable, Op


def make_op() -> Op[str]:
    op: Op[str] = Op("sample")
    op.register(Implementation("fast", frozenset({"cuda"}), lambda: None, lambda: "fast object"))
    op.register(Implementation("absent", frozenset({"cpu", "cuda"}), lambda: "package 'absent' is not installed", lambda: "never made"))
    op.register(Implementation("plain", frozenset({"cpu", "cuda"}), lambda: None, lambda: "plain object"))
    return op


def test_auto_takes_the_first_that_runs() -> None:
    assert make_op().choose("auto", "cuda") == "fast"
    assert make_op().resolve("auto", "cpu") == "plain object"


def test_status_says_why_not() -> None:
    assert make_op().status("cpu") == {"fast": "runs on cuda only", "absent": "package 'absent' is not installed", "plain": None}


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("fast", r"sample: 'fast' cannot run on cpu \(fast: runs on cuda only\); use plain"),
        ("absent", r"absent: package 'absent' is not installed\); use plain"),
        ("fats", "there is no implementation 'fats'; known: auto, fast, absent, plain"),
    ],
)
def test_a_named_one_runs_or_says_why_not(requested: str, message: str) -> None:
    with pytest.raises(KernelUnavailable, match=message):
        make_op().resolve(requested, "cpu")


def test_an_op_without_implementations() -> None:
    with pytest.raises(KernelUnavailable, match="none is registered"):
        Op("empty").choose("auto", "cpu")


def test_a_name_belongs_to_one_implementation() -> None:
    op = make_op()
    with pytest.raises(ValueError, match="'plain' is registered twice"):
        op.register(Implementation("plain", frozenset({"cpu"}), lambda: None, lambda: None))


def test_a_choice_says_why_nothing_better_runs() -> None:
    assert choose(make_op(), "auto", "cpu") == Choice("sample", "plain", "absent: package 'absent' is not installed"), "nothing of other devices"
    assert choose(make_op(), "auto", "cuda") == Choice("sample", "fast", "")
    assert choose(make_op(), "plain", "cuda") == Choice("sample", "plain", "kernel_backends names it")


def test_the_config_names_ops_that_exist() -> None:
    assert [choice.runs for choice in choose_backends(dict.fromkeys(OPS, "reference"), "cpu")] == ["reference"] * len(OPS)
    found = {choice.part: choice.runs for choice in choose_backends({"permute": "reference"}, "cpu")}
    assert found == {name: op.choose("auto", "cpu") for name, op in OPS.items()} | {"permute": "reference"}
    assert [choice.part for choice in choose_backends({}, "cpu", ["route"])] == ["route"]
    with pytest.raises(KernelUnavailable, match="there is no op 'grouped_gem'; known: attention, decode, dispatch, experts, grouped_gemm"):
        choose_backends({"grouped_gem": "auto"}, "cpu")
