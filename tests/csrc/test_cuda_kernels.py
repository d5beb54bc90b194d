"""The CUDA kernels against the definitions of the contract tests: on the emulated GPU, and on a real one by `pytest -m gpu`.

On the emulated GPU a call also fails if a kernel races, reads a copy that it did not wait for, or touches memory that is not its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron.kernels import cuda_library
from megatron.kernels import grouped_gemm as gemm
from megatron.kernels import grouped_lore as lore
from megatron.kernels import permute as perm
from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.cuda_library import CudaLibrary, Rows
from megatron.kernels.grouped_gemm.cuda import Cuda as CudaGemm
from megatron.kernels.grouped_lore.cuda import Cuda as CudaLore
from megatron.kernels.grouped_lore.interface import HiddenLayer, LoreChoice, Projection
from megatron.kernels.registry import Implementation
from megatron.testing.devices import DEVICES
from tests.contracts import test_kernels as contract
from tests.csrc.building import built, emulated, load_cuda_build

HALVES = [torch.bfloat16, torch.float16]
ROWS = contract.ROWS
TILES = {"two tiles": [70, 0, 3], "large tiles": [150, 0, 2, 260], "whole tiles": [64, 128]}


@pytest.fixture(autouse=True)
def implementations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated GPU as another implementation for tensors of the CPU."""
    if request.node.get_closest_marker("gpu") is not None:
        reason = cuda_library.unavailable() or (None if torch.cuda.is_available() else "there is no CUDA device")
        if reason is not None:
            pytest.skip(reason)
        return
    for op, make in ((gemm.OP, CudaGemm), (lore.OP, CudaLore)):
        entry = Implementation("emulated", frozenset({"cpu"}), lambda: None, lambda make=make: make(emulated()))
        monkeypatch.setattr(op, "_known", {**op._known, "emulated": entry})


def backend(device: str) -> str:
    return "cuda" if device == "cuda" else "emulated"


def library(device: str) -> CudaLibrary:
    return cuda_library.load() if device == "cuda" else emulated()


def close(got: Tensor, wanted: Tensor, *, roundings: int = 4) -> None:
    """Within some roundings of the largest number: intermediate results have 16 bits too."""
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=roundings * torch.finfo(got.dtype).eps * scale)


def check(ours: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: tuple[Tensor, ...], _tolerances: object = None) -> None:
    """Values and gradients, as `close` compares them; the definition is computed in float64."""
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    got, wanted = ours(*inputs), definition(*wide)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(wanted.device, got.dtype)
    close(got, wanted)
    for g, w in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, wide, grad.double()), strict=True):
        assert g.dtype == got.dtype
        close(g, w)


def check_gemm(rows: list[int], shape: tuple[int, int], dtype: torch.dtype, device: str, *, transposed: bool) -> None:
    draw, counts, (inner, outer) = contract.Draw(dtype, device), torch.tensor(rows, device=device), shape
    inputs = draw(sum(rows), inner), draw(len(rows), outer, inner) if transposed else draw(len(rows), inner, outer)

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        parts = x.split(rows)
        return torch.cat([part @ (w.T if transposed else w) for part, w in zip(parts, weight, strict=True)])

    check(lambda x, w: gemm.grouped_gemm(x, w, counts, transposed=transposed, backend=backend(device)), definition, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (8, 16)], ids=str)
def test_grouped_gemm(shape: tuple[int, int], transposed: bool, dtype: torch.dtype, device: str) -> None:
    for rows in ROWS.values():
        check_gemm(rows, shape, dtype, device, transposed=transposed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", TILES.values(), ids=TILES.keys())
def test_grouped_gemm_over_several_tiles(rows: list[int], transposed: bool, device: str) -> None:
    check_gemm(rows, (40, 136), torch.bfloat16, device, transposed=transposed)
    check_gemm(rows, (135, 66), torch.float16, device, transposed=transposed)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", TILES.values(), ids=TILES.keys())
def test_grouped_gemm_over_more_steps_than_stages(rows: list[int], dtype: torch.dtype, transposed: bool, device: str) -> None:
    for shape in ((328, 264), (257, 131), (64, 64), (1, 300)):
        check_gemm(rows, shape, dtype, device, transposed=transposed)


def check_hidden(rows: list[int], kind: str, draw: contract.Draw, monkeypatch: pytest.MonkeyPatch, **given: object) -> None:
    """As the contract test, with bounds that follow the size of the results."""
    monkeypatch.setattr(contract, "check", check)
    contract.check_lore(backend(draw.device), rows, kind, draw, **given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choices", [None, 1, 2])
@pytest.mark.parametrize("kind", contract.KINDS)
def test_every_kind_of_hidden_layer(kind: str, choices: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (ROWS["empty_expert"], ROWS["no_rows"]):
        check_hidden(rows, kind, contract.Draw(torch.bfloat16, device), monkeypatch, choices=choices)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("choices", [None, 1, 2])
@pytest.mark.parametrize("kind", contract.KINDS)
def test_every_kind_of_hidden_layer_with_all_rows(
    kind: str, choices: int | None, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows in ROWS.values():
        check_hidden(rows, kind, contract.Draw(dtype, device), monkeypatch, choices=choices)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("plain", "entangled both"):
        check_hidden(ROWS["empty_expert"], kind, contract.Draw(dtype, device), monkeypatch, choices=1, activation=activation)


@pytest.fixture
def wide_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way, a rank of more than one step."""
    for name, value in (("D", 104), ("F", 136), ("M", 5), ("Q", 40)):
        monkeypatch.setattr(contract, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("wide_shapes")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choices", [None, 1, 2])
@pytest.mark.parametrize("rows", TILES.values(), ids=TILES.keys())
def test_hidden_layers_over_several_tiles(rows: list[int], choices: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("entangled", "entangled gate with biases", "decomposed with a gate"):
        check_hidden(rows, kind, contract.Draw(torch.float16, device, scale=0.2), monkeypatch, choices=choices)


@pytest.mark.parametrize("device", DEVICES)
def test_a_lore_that_a_row_chooses_twice(device: str) -> None:
    draw, counts = contract.Draw(torch.float16, device), torch.tensor([2, 1], device=device)
    order = perm.sort_by_group(torch.tensor([[1, 1], [0, 1], [2, 2]], device=device), 4)
    x, pi, a, b = draw(3, 8), draw(3, 2), draw(4, 3, 8), draw(4, 3, 5)

    def compute(name: str) -> list[Tensor]:
        layer = HiddenLayer(counts, "identity", Projection(None, a, b), choice=LoreChoice(pi, order))
        y = lore.grouped_lore(x, layer, backend=name)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, pi, a, b))]

    for got, wanted in zip(compute(backend(device)), compute("reference"), strict=True):
        close(got, wanted.double())


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_and_any_alignment(device: str) -> None:
    draw, counts = contract.Draw(torch.bfloat16, device), torch.tensor([4, 0, 2], device=device)
    flat = draw(3 * 16 * 8 + 3 * 16 + 1).detach()  # parameters in one buffer, none at a multiple of 16 bytes
    weight, bias = flat[1 : 1 + 3 * 16 * 8].view(3, 16, 8), flat[1 + 3 * 16 * 8 :].view(3, 16)
    x = draw(8, 6).detach().t()

    def compute(*given: Tensor) -> Tensor:
        layer = HiddenLayer(counts, "silu", Projection(given[1], bias_EF=given[2]))
        return lore.grouped_lore(given[0], layer, backend=backend(device))

    assert torch.equal(compute(x, weight, bias), compute(x.contiguous(), weight.clone(), bias.clone()))
    turned = weight.mT.contiguous().mT
    plain = gemm.grouped_gemm(x, weight, counts, transposed=True, backend=backend(device))
    assert torch.equal(gemm.grouped_gemm(x, turned, counts, transposed=True, backend=backend(device)), plain)


BAD_COUNTS = {"too many": [4, 9, 2], "huge": [1 << 62, 1 << 62, 1 << 62], "negative": [-3, 4, -(1 << 62)], "too few": [1, 0, 2], "none": [0, 0, 0]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", BAD_COUNTS.values(), ids=BAD_COUNTS.keys())
def test_wrong_counts_on_the_device_touch_nothing_else(counts: list[int], device: str) -> None:
    """There a count cannot be checked without a wait. It is cut off; rows of no expert are 0."""
    kernels, draw = library(device), contract.Draw(torch.bfloat16, device)
    x, weight = draw(6, 8).detach(), draw(3, 5, 8).detach()
    groups, left, expected = kernels.offsets(torch.tensor(counts, device=device), 6), 6, []
    for count in counts:
        expected.append(max(0, min(count, left)))
        left -= expected[-1]
    assert groups.offsets[:5].tolist() == [sum(expected[:i]) for i in range(4)] + [6]
    out = kernels.empty(x, 6, 5)
    kernels.rows(Rows(x_RI=x, groups=groups, weight=weight, outer=False, width=5, product=out))
    wanted = [row @ w.T for w, rows in zip(weight.double(), x.double().split([*expected, left])[:3], strict=True) for row in rows]
    close(out, torch.stack(wanted + [torch.zeros(5, dtype=torch.float64, device=device)] * left))
    assert kernels.outer(x, out, groups).isfinite().all()
    assert kernels.column_sums(x, groups).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choices", [1, 2])
def test_a_wrong_order_touches_nothing_else(choices: int, device: str) -> None:
    """Places and choices that no row has are passed over."""
    draw, counts = contract.Draw(torch.float16, device), torch.tensor([2, 2], device=device)
    wrong = torch.tensor([-1, 10**15, 99, 0, -(10**15), 7, 2, 4], device=device)[: 4 * choices]
    order = perm.Order(wrong, wrong.view(4, choices), torch.tensor([1, 0, 2, 4 * choices - 3], device=device))
    x, pi, a, b, weight = draw(4, 8), draw(4, choices), draw(4, 3, 8), draw(4, 3, 5), draw(2, 5, 8)
    layer = HiddenLayer(counts, "gelu", Projection(weight, a, b), choice=LoreChoice(pi, order))
    lore.grouped_lore(x, layer, backend=backend(device)).float().sum().backward()


@pytest.mark.parametrize(
    ("counts", "message"),
    [([3, -1, 1], r"row counts \[3, -1, 1\] have a negative one"), ([1, 1, 2], "row counts sum to 4, but there are 3 rows")],
)
def test_wrong_counts_on_the_cpu_are_refused(counts: list[int], message: str) -> None:
    draw, rows = contract.Draw(torch.bfloat16, "cpu"), torch.tensor(counts)
    with pytest.raises(ValueError, match=message):
        gemm.grouped_gemm(draw(3, 8), draw(3, 8, 4), rows, backend="emulated")
    with pytest.raises(ValueError, match=message):
        lore.grouped_lore(draw(3, 8), HiddenLayer(rows, "gelu", Projection(draw(3, 4, 8))), backend="emulated")


def test_without_a_library_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "libneox_cuda.so")
    assert cuda_library.unavailable() == "libneox_cuda.so is not built; 'python csrc/cuda_build.py --library' builds it where nvcc is"


@pytest.mark.usefixtures("wide_shapes")
def test_results_do_not_depend_on_the_order_of_blocks_and_threads() -> None:
    """Bit for bit, forward and backward: every sum has one order, whatever runs first."""
    results: list[list[Tensor]] = []
    choices = 2
    for backwards in (0, 1):
        rows, draw = [70, 0, 5], contract.Draw(torch.bfloat16, "cpu", scale=0.3)
        order, _ = contract.lore_case(rows, choices)
        inputs = (
            draw(sum(rows), contract.D),
            draw(sum(rows), choices),
            *contract.lore_inputs(draw, rows, "entangled gate with biases", 3 * contract.M),
        )
        layer = contract.lore_layer("entangled gate with biases", inputs[2:], torch.tensor(rows), "silu", LoreChoice(inputs[1], order))
        emulated()._functions.emulation_run_backwards(backwards)
        try:
            y = lore.grouped_lore(inputs[0], layer, backend="emulated")
            results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
        finally:
            emulated()._functions.emulation_run_backwards(0)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_another_device_are_refused(device: str) -> None:
    """Their addresses mean nothing there. Nothing is launched."""
    draw, counts = contract.Draw(torch.bfloat16, device), torch.tensor([2, 1], device=device)
    other = "cpu" if device == "cuda" else "meta"
    elsewhere = rf"the kernels read the memory of one {device} device, but there is .* on {other}"
    with pytest.raises(ValueError, match=elsewhere):
        CudaGemm(library(device)).matmul(draw(3, 8), draw(2, 8, 4).to(other), counts, transposed=False)
    layer = HiddenLayer(counts, "gelu", Projection(draw(2, 4, 8).to(other)))
    with pytest.raises(ValueError, match=elsewhere):
        CudaLore(library(device)).forward(draw(3, 8), layer, save=False)


@pytest.mark.parametrize("device", DEVICES)
def test_counts_may_be_on_the_cpu(device: str) -> None:
    draw, counts = contract.Draw(torch.bfloat16, device), torch.tensor([2, 1])
    x, weight = draw(3, 8), draw(2, 4, 8)
    layer = HiddenLayer(counts, "identity", Projection(weight))
    got = gemm.grouped_gemm(x, weight, counts, transposed=True, backend=backend(device))
    assert torch.equal(lore.grouped_lore(x, layer, backend=backend(device)), got)
    with pytest.raises(ValueError, match="row counts sum to 3, but there are 2 rows"):
        gemm.grouped_gemm(x[:2], weight, counts, transposed=True, backend=backend(device))


def test_more_rows_than_32_bits_count_are_refused() -> None:
    with pytest.raises(ValueError, match=r"count rows in 32 bits, and there are 2147483648; split the batch"):
        emulated().offsets(torch.tensor([1 << 31]), 1 << 31)


def test_more_groups_than_a_grid_has_are_the_references() -> None:
    counts = torch.zeros(70_000, dtype=torch.int64)
    counts[-1] = 2
    x, y = (contract.Draw(torch.bfloat16, "cpu")(2, width).detach() for width in (1, 1))
    got = CudaGemm(emulated()).outer(x, y, counts)
    assert got.count_nonzero() == 1
    close(got[-1], x.double().T @ y.double())


# ---------------------------------------------------------------- the detector on the kernels themselves


FAULTS = {
    "a barrier less": ("__syncthreads();  // the copies of this step", "//", "race: thread"),
    "a wait too short": ("wait_async<C::STAGES - 2>();", "wait_async<C::STAGES - 1>();", "missing wait: thread"),
    "rows not cut off": ("return begin + i < end ? begin + i : -1;", "return begin + i;", "out of bounds: thread"),
}


@pytest.fixture
def copied_sources(tmp_path: Path) -> Iterator[ModuleType]:
    """csrc/cuda_build.py with sources that a test may change."""
    build = load_cuda_build()
    folder = tmp_path / "csrc"
    shutil.copytree(build.CSRC, folder, ignore=shutil.ignore_patterns("*.so"))
    original, build.CSRC = build.CSRC, folder
    yield build
    build.CSRC = original


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "found"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_in_our_kernels_is_found(before: str, after: str, found: str, copied_sources: ModuleType, tmp_path: Path) -> None:
    source = copied_sources.CSRC / "include" / "cuda_tiles.cuh"
    text = source.read_text()
    assert text.count(before) == 1
    source.write_text(text.replace(before, after))
    copied_sources.build_emulation(tmp_path / "faulty.so", [copied_sources.CSRC / "grouped_gemm" / "cuda.cu"])
    faulty, draw = CudaGemm(CudaLibrary(tmp_path / "faulty.so")), contract.Draw(torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match=found):
        faulty.matmul(draw(70, 300).detach(), draw(2, 300, 40).detach(), torch.tensor([66, 4]), transposed=False)


# ---------------------------------------------------------------- nvcc


LOG = """
ptxas info    : Compiling entry function '_Z5smallv' for 'sm_80'
ptxas info    : Function properties for _Z5smallv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5largev' for 'sm_100'
ptxas info    : Function properties for _Z5largev
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def test_what_ptxas_says_is_read() -> None:
    small, large = load_cuda_build().parse(LOG)
    assert (small.architecture, small.registers, small.shared, small.spills) == ("80", 40, 512, 0)
    assert (large.architecture, large.registers, large.shared, large.spills) == ("100", 255, 0, 48)


def test_names_of_kernels_can_be_read() -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("there is no c++filt on this machine")
    name = load_cuda_build().demangle
    assert name("_ZN12_GLOBAL__N_15routeE5Route") == "route"
    assert name("_Z13multiply_rowsI5Large8BFloat16Lb1ELb0EEv10RowProduct") == "multiply_rows<Large, BFloat16, true, false>"


def check_spills(sources: list[Path], architectures: set[str], at_least: int, folder: Path) -> None:
    """At least so many kernels for each architecture, and none of them puts registers into memory."""
    build = load_cuda_build()
    try:
        architectures &= set(build.known_architectures())
        if not architectures:
            pytest.skip("this nvcc does not compile for the architecture")
        kernels = build.compile_objects(sorted(architectures), folder, sources)
    except build.NotBuilt as reason:
        if "there is no nvcc" not in str(reason):
            raise
        pytest.skip(str(reason))
    assert {kernel.architecture for kernel in kernels} == architectures
    assert [kernel for kernel in kernels if kernel.spills] == []
    assert len(kernels) >= at_least * len(architectures)


def test_no_kernel_of_route_spills(tmp_path: Path) -> None:
    """The products take longer to compile: below."""
    check_spills([load_cuda_build().CSRC / "route" / "cuda.cu"], {"80", "90", "100"}, 7, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_no_kernel_spills(architecture: str, tmp_path: Path) -> None:
    check_spills(load_cuda_build().sources(), {architecture}, 34, tmp_path)


def test_the_build_is_kept() -> None:
    """A second request compiles nothing."""
    sources = load_cuda_build().sources()
    assert built("emulation", sources) == built("emulation", sources)
