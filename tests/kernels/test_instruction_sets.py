"""Which instruction set the compiled kernels run in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron.kernels import compiled
from megatron.kernels.grouped_lore import HiddenLayer, LoreChoice, Projection, grouped_lore
from megatron.kernels.permute import sort_by_group
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


@pytest.mark.parametrize("width", [8256, 8200], ids=["whole cache lines", "parts of cache lines"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_written_past_the_caches(built: ModuleType, dtype: torch.dtype, width: int) -> None:
    """dB has more than the 16 MiB of csrc's STREAM_BYTES, dA less. LoREs have no rows, few and many."""
    draw = torch.Generator().manual_seed(1)
    shapes = (30, 520), (2, width, 520), (8, 128, 520), (8, 128, width)
    x, weight, a, b = ((torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(dtype) for shape in shapes)
    assert a.nbytes < 16 << 20 < b.nbytes
    chosen = torch.tensor([0] * 18 + [1, 3] + [4] * 2 + [6] * 8)[:, None]
    choice = LoreChoice(torch.rand(30, 1, generator=draw), sort_by_group(chosen, 8))
    grad = torch.randn(30, width, generator=draw).to(dtype)

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        given = [t.detach().requires_grad_() for t in (x, weight, a, b)]
        layer = HiddenLayer(torch.tensor([20, 10]), "gelu", Projection(*given[1:]), None, choice)
        return torch.autograd.grad(grouped_lore(given[0], layer, backend=backend), given, grad)

    wanted = gradients("reference")
    rtol, atol = (2e-2, 2e-2) if dtype == torch.bfloat16 else (1e-4, 1e-5)  # bf16: both round what they add up
    for name in built.instruction_sets():
        built.use_instruction_set(name)
        for ours, right in zip(gradients("compiled"), wanted, strict=True):
            torch.testing.assert_close(ours, right, rtol=rtol, atol=atol)


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
