"""Which instruction set the compiled kernels run in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron.kernels import compiled
from megatron.kernels.grouped_gemm import grouped_gemm
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


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def check_every_set(built: ModuleType, dtype: torch.dtype, results: Callable[[str], Sequence[torch.Tensor]]) -> None:
    """`results(backend)`: tensors, of which most have more than the 1 MiB of csrc's STREAM_BYTES."""
    wanted = results("reference")
    assert sum(t.nbytes > 1 << 20 for t in wanted) > len(wanted) / 2
    rtol, atol = (2e-2, 2e-2) if dtype == torch.bfloat16 else (1e-4, 1e-5)  # bf16: both round what they add up
    for name in built.instruction_sets():
        built.use_instruction_set(name)
        for ours, right in zip(results("compiled"), wanted, strict=True):
            torch.testing.assert_close(ours, right, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("rows", "width_in", "width", "gated"), [(70, 520, 8256, False), (70, 520, 8200, False), (600, 928, 1056, True), (600, 1056, 936, True)]
)
def test_hidden_layers_that_are_written_past_the_caches(
    built: ModuleType, dtype: torch.dtype, rows: int, width_in: int, width: int, gated: bool
) -> None:
    """Whole cache lines and parts of them; sums that fit into a cache and sums in the result. LoREs have no rows, few and many."""
    draw = torch.Generator().manual_seed(1)
    shapes = (rows, width_in), (2, width, width_in), (8, 128, width_in), (8, 128, width), (2, width, width_in)
    tensors = [(torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(dtype) for shape in shapes]
    choice_of_rows = torch.tensor([0] * (rows - 12) + [1, 3] + [4] * 2 + [6] * 8)[:, None]
    choice = LoreChoice(torch.rand(rows, 1, generator=draw), sort_by_group(choice_of_rows, 8))
    grad = torch.randn(rows, width, generator=draw).to(dtype)

    def results(backend: str) -> list[torch.Tensor]:
        x, *parts, gate = (t.detach().requires_grad_() for t in tensors)
        layer = HiddenLayer(torch.tensor([rows - 10, 10]), "gelu", Projection(*parts), Projection(gate) if gated else None, choice)
        hidden = grouped_lore(x, layer, backend=backend)
        return [hidden.detach(), *torch.autograd.grad(hidden, [x, *parts, *([gate] if gated else [])], grad)]

    check_every_set(built, dtype, results)


@pytest.mark.parametrize("width", [928, 1056, 2056])
def test_products_that_are_written_past_the_caches(built: ModuleType, dtype: torch.dtype, width: int) -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.tensor([500, 0, 100, 40, 1, 3])
    x, weight = ((torch.randn(shape, generator=draw) / 10).to(dtype) for shape in ((644, 96), (6, 96, width)))
    grad = torch.randn(644, width, generator=draw).to(dtype)

    def results(backend: str) -> list[torch.Tensor]:
        given = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = grouped_gemm(*given, rows, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, given, grad)]

    check_every_set(built, dtype, results)


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
