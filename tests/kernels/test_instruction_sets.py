"""Which instruction set the compiled kernels run in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from megatron.kernels import compiled
from megatron.kernels.registry import KernelUnavailable


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The real module; the set in use is put back."""
    module, reason = compiled.load()
    if module is None:
        pytest.skip(f"the kernels are {reason}")
    used = module.instruction_set()
    monkeypatch.delenv(compiled.LIMIT, raising=False)
    yield module
    module.use_instruction_set(used)


def test_the_best_set_of_the_processor_is_used_up_to_the_limit(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real = [name for name in built.instruction_sets() if not name.startswith("emulated")]
    compiled.choose_set(built)
    assert built.instruction_set() == real[-1]
    for name in real:
        monkeypatch.setenv(compiled.LIMIT, name)
        compiled.choose_set(built)
        assert built.instruction_set() == name
    if "amx" in built.compiled_sets():  # a limit above what the processor has
        monkeypatch.setenv(compiled.LIMIT, "amx")
        compiled.choose_set(built)
        assert built.instruction_set() == real[-1]


def test_an_unknown_limit_is_an_error(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.LIMIT, "avx3")
    with pytest.raises(KernelUnavailable, match=r"NEOX_INSTRUCTION_SET = 'avx3' is not an instruction set of the compiled kernels; known: generic"):
        compiled.choose_set(built)


def test_every_set_of_the_processor_agrees_with_generic(built: ModuleType) -> None:
    assert {name: built.difference(name) for name in built.instruction_sets()} == dict.fromkeys(built.instruction_sets(), "")
    assert "generic" in built.checked_sets
    with pytest.raises(ValueError, match="not compiled for avx3"):
        built.difference("avx3")
    with pytest.raises(ValueError, match="nothing would be left"):
        built.refuse_instruction_set("generic")


class OtherProcessor:
    """What `choose_set` asks a module, on a processor that has more sets than the one where it was built. No arithmetic."""

    checked_sets = ("generic", "avx2")

    def __init__(self, wrong: dict[str, str]) -> None:
        self.wrong, self.sets, self.tried, self.used = wrong, ["generic", "avx2", "avx512", "avx512bf16", "amx"], [], ""

    def compiled_sets(self) -> list[str]:
        return [*self.sets, "emulated_amx"]

    def instruction_sets(self) -> list[str]:
        return [*self.sets, "emulated_amx"]

    def difference(self, name: str) -> str:
        self.tried.append(name)
        return self.wrong.get(name, "")

    def refuse_instruction_set(self, name: str) -> None:
        self.sets.remove(name)

    def use_instruction_set(self, name: str) -> None:
        assert name in self.instruction_sets()
        self.used = name


@pytest.mark.parametrize(
    ("wrong", "limit", "used", "tried"),
    [
        ({}, "", "amx", ["avx512", "avx512bf16", "amx"]),
        ({"amx": "attention differs"}, "", "avx512bf16", ["avx512", "avx512bf16", "amx"]),
        (dict.fromkeys(("amx", "avx512", "avx512bf16"), "signal 4"), "", "avx2", ["avx512", "avx512bf16", "amx"]),
        ({"amx": "attention differs"}, "avx512", "avx512", ["avx512"]),
        ({"avx512": "attention differs"}, "avx2", "avx2", []),
    ],
)
def test_a_set_that_the_build_was_not_checked_in_is_tried_before_it_is_used(
    wrong: dict[str, str], limit: str, used: str, tried: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(compiled.LIMIT, limit)
    module: Any = OtherProcessor(wrong)
    with caplog.at_level(logging.WARNING):
        compiled.choose_set(module)
    assert (module.used, module.tried) == (used, tried)
    for name in wrong.keys() & set(tried):
        assert f"the instruction set {name} is not used, because its results are wrong on this processor ({wrong[name]})" in caplog.text
