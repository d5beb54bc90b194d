"""The fused output projection and cross entropy against PyTorch's own on all logits at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.kernels.linear_cross_entropy import OP, cce, chunked, liger, linear_cross_entropy
from megatron.kernels.linear_cross_entropy.compiled import MIN_CHUNK_ROWS, chunk_rows
from megatron.kernels.registry import KernelUnavailable
from tests.contracts.comparing import NANS, check_that_threads_change_no_bit, draw, nan_of, skip_unless_it_runs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
OURS = ["chunked", "compiled"]


@pytest.fixture(params=OURS)
def backend(request: pytest.FixtureRequest) -> str:
    skip_unless_it_runs(OP, request.param)
    return request.param


def case(tokens: int, dtype: torch.dtype = torch.float64, vocabulary: int = 37, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * (12 / width) ** 0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def mask_of(kind: str, tokens: int) -> Tensor | None:
    fractions = torch.rand(tokens, generator=torch.Generator().manual_seed(1))
    return {"none": None, "binary": (fractions > 0.5).float(), "fractions": fractions}[kind]


@pytest.fixture(params=[3, 7, 23], ids=["minimum", "seven", "one_chunk"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 1)
    for module in ("chunked", "compiled"):
        monkeypatch.setattr(f"megatron.kernels.linear_cross_entropy.{module}.MIN_CHUNK_ROWS", request.param)
    monkeypatch.setattr("megatron.kernels.linear_cross_entropy.compiled.CHUNK_BYTES", 1)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", ["none", "binary", "fractions"])
def test_equals_the_plain_definition(backend: str, dtype: torch.dtype, mask: str) -> None:
    check_against_the_definition(backend, case(23, dtype), mask)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width"), [(1, 1, 1), (1, 2, 3), (97, 16, 32), (130, 193, 7), (300, 3300, 64), (20, 70, 1030), (1100, 40, 5)]
)
def test_sizes_that_divide_nothing(backend: str, tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> None:
    check_against_the_definition(backend, case(tokens, dtype, vocabulary, width), "fractions")


def check_against_the_definition(backend: str, given: tuple[Tensor, Tensor, Tensor], mask: str) -> None:
    hidden, weight, labels = given
    tokens, dtype = len(labels), hidden.dtype
    ours, token_loss = linear_cross_entropy(hidden, weight, labels, mask_of(mask, tokens), backend=backend)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    plain, plain_token_loss = linear_cross_entropy(*wide, labels, mask_of(mask, tokens), backend="reference")
    tolerance = TOLERANCE[dtype]
    assert ours.dtype == token_loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(ours.double(), plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(token_loss.double(), plain_token_loss, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(torch.autograd.grad(3 * ours, (hidden, weight)), torch.autograd.grad(3 * plain, wide), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_gradients_of_what_is_well_predicted_are_exact_to_their_own_size(backend: str) -> None:
    """In bf16 a probability near 1 is rounded by more than what is left of the error, 1 - p. So the error must be rounded, not the probability."""
    hidden, weight = torch.zeros(4, 8), torch.zeros(40, 8)
    hidden[:, 0], weight[3, 0] = torch.tensor([9.0, 10.0, 11.0, 12.0]), 1.0
    given = [t.bfloat16().requires_grad_() for t in (hidden, weight)]
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    labels = torch.full((4,), 3)
    got, _ = linear_cross_entropy(*given, labels, None, backend=backend)
    wanted, _ = linear_cross_entropy(*wide, labels, None, backend="reference")
    for own, exact in zip(torch.autograd.grad(got, given), torch.autograd.grad(wanted, wide), strict=True):
        torch.testing.assert_close(own.double()[:, 0], exact[:, 0], rtol=2e-2, atol=1e-12)


def test_the_plain_definition_is_pytorchs() -> None:
    hidden, weight, labels = case(9)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, labels, backend="reference")[0], torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)
    )


def test_gradcheck(backend: str) -> None:
    hidden, weight, labels = case(5, vocabulary=6)
    mask = mask_of("fractions", 5)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, mask, backend=backend)[0], (hidden, weight))


def test_a_token_that_is_impossible_has_a_finite_loss(backend: str) -> None:
    hidden, weight = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([1]), backend=backend)
    assert loss.item() == 2000.0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_whole_part_of_the_vocabulary_may_be_excluded(backend: str, dtype: torch.dtype) -> None:
    """Logits of minus infinity are probabilities of 0, also where a block of them has no other."""
    hidden, weight = (torch.ones(n, 1, dtype=dtype) for n in (2, 500))
    weight[:400] = -torch.inf
    _, token_loss = linear_cross_entropy(hidden, weight, torch.tensor([450, 499]), backend=backend)
    torch.testing.assert_close(token_loss, torch.full_like(token_loss, 100).log(), rtol=1e-6, atol=1e-6)
    _, impossible = linear_cross_entropy(hidden, weight, torch.tensor([3, 499]), backend=backend)
    assert impossible.tolist() == [torch.inf, token_loss[1].item()]


@pytest.mark.parametrize("bad", [torch.tensor(torch.inf), *map(nan_of, NANS)], ids=["inf", *map(str, NANS)])
def test_what_is_not_a_number_shows_in_its_row_alone(backend: str, bad: Tensor) -> None:
    hidden, weight, labels = case(5, torch.float32, vocabulary=300)
    with torch.no_grad():
        hidden[2, 3] = bad
    loss, token_loss = linear_cross_entropy(hidden, weight, labels, backend=backend)
    (grad,) = torch.autograd.grad(loss, (hidden,))
    assert not loss.isfinite()
    assert token_loss.isfinite().tolist() == grad.isfinite().all(1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("label", [-1, -100, 37, 2**40])
def test_a_label_outside_the_vocabulary_is_an_error(backend: str, label: int) -> None:
    hidden, weight, labels = case(4)
    labels[2] = label
    with pytest.raises((ValueError, RuntimeError), match=f"index {label} is out of bounds|the label of token 2 is {label}, but .* has 37 tokens"):
        linear_cross_entropy(hidden, weight, labels, backend=backend)


def test_strided_inputs_and_narrow_labels(backend: str) -> None:
    hidden, weight, labels = case(6, torch.float32)
    wanted = linear_cross_entropy(hidden, weight, labels, backend=backend)
    turned = [t.detach().t().contiguous().t() for t in (hidden, weight)]
    torch.testing.assert_close(linear_cross_entropy(*turned, labels.repeat_interleave(2)[::2], backend=backend)[1], wanted[1])


def test_the_number_of_threads_changes_no_bit() -> None:
    skip_unless_it_runs(OP, "compiled")

    def compute() -> tuple[Tensor, ...]:
        inputs = draw(300, 40), draw(2000, 40, seed=1)
        loss, token_loss = linear_cross_entropy(*inputs, torch.arange(300), backend="compiled")
        return loss, token_loss, *torch.autograd.grad(loss, inputs)

    check_that_threads_change_no_bit(compute, (1, 2, 5, 16))


def test_formats_that_are_not_compiled() -> None:
    """float16 is computed by `chunked`; mixed formats are an error."""
    skip_unless_it_runs(OP, "compiled")
    hidden, weight, labels = case(4, torch.float16)
    ours, theirs = (linear_cross_entropy(hidden, weight, labels, backend=name) for name in OURS)
    assert torch.equal(ours[1], theirs[1])
    with pytest.raises(ValueError, match="give all of them one format"):
        linear_cross_entropy(hidden.float(), weight, labels, backend="compiled")


def test_all_masked_is_zero_and_has_zero_gradients(backend: str) -> None:
    hidden, weight, labels = case(4)
    loss, token_loss = linear_cross_entropy(hidden, weight, labels, torch.zeros(4), backend=backend)
    assert loss.item() == 0
    assert (token_loss > 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_only_the_gradients_that_are_wanted(backend: str) -> None:
    inputs, labels = case(4)[:2], case(4)[2]
    both = torch.autograd.grad(linear_cross_entropy(*inputs, labels, backend=backend)[0], inputs)
    for place in (0, 1):
        given = [t if n == place else t.detach() for n, t in enumerate(inputs)]
        (only,) = torch.autograd.grad(linear_cross_entropy(*given, labels, backend=backend)[0], (inputs[place],))
        assert torch.equal(only, both[place])


def test_without_gradients_only_the_losses_are_computed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = case(4)
    wanted = linear_cross_entropy(hidden, weight, labels, backend=backend)
    monkeypatch.setattr(chunked, "_subtract_labels", None)
    with torch.no_grad():
        loss, token_loss = linear_cross_entropy(hidden, weight, labels, backend=backend)
    assert not loss.requires_grad
    assert torch.equal(loss, wanted[0])
    assert torch.equal(token_loss, wanted[1])


def test_a_retained_graph_gives_the_same_gradient_twice(backend: str) -> None:
    hidden, weight, labels = case(4)
    loss = 2 * linear_cross_entropy(hidden, weight, labels, backend=backend)[0]
    first, second = (torch.autograd.grad(loss, (hidden,), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_tokens(backend: str) -> None:
    hidden, weight, labels = case(0)
    loss, _ = linear_cross_entropy(hidden, weight, labels, backend=backend)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_a_width_of_nothing(backend: str) -> None:
    hidden, weight, labels = case(3, width=1)
    _, token_loss = linear_cross_entropy(hidden[:, :0], weight[:, :0], labels, backend=backend)
    torch.testing.assert_close(token_loss, torch.full_like(token_loss, 37).log())


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "mask", "message"),
    [
        ((4, 3), (5, 2), (4,), None, r"hidden \(4, 3\) and weight \(5, 2\) must be \[tokens, width\]"),
        ((4, 3), (5, 3), (3,), None, r"labels of shape \(3,\) for 4 tokens"),
        ((4, 3), (5, 3), (4,), (2,), r"mask of shape \(2,\) for 4 tokens"),
    ],
)
def test_shapes_that_do_not_fit(
    hidden: tuple[int, ...], weight: tuple[int, ...], labels: tuple[int, ...], mask: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.int64), None if mask is None else torch.ones(mask)
        )


# Prints the peak of resident memory in MiB, less what the inputs and a small step before take. Chunks are as large as on a GPU.
PEAK = """
import resource, sys, torch
from megatron.kernels.linear_cross_entropy import chunked, linear_cross_entropy

chunked.CHUNK_ELEMENTS["cpu"] = chunked.CHUNK_ELEMENTS["cuda"]

def step(tokens, vocabulary, backend):
    hidden, weight = torch.randn(tokens, 64, requires_grad=True), torch.randn(vocabulary, 64, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    linear_cross_entropy(hidden, weight, torch.arange(tokens) % vocabulary, backend=backend)[0].backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

step(16, 32, sys.argv[3])
print(step(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]) // 1024)
"""


def peak(repository: Path, tokens: int, vocabulary: int, backend: str) -> int:
    command = [sys.executable, "-c", PEAK, str(tokens), str(vocabulary), backend]
    return int(subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True, timeout=600).stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_loss_step_needs_a_fifth_of_the_memory(backend: str, repository: Path) -> None:
    """8192 tokens of a vocabulary of 128256: gradients included, inputs not."""
    ours, plain = (peak(repository, 8192, 128256, name) for name in (backend, "reference"))
    assert ours <= plain / 5, f"{ours} MiB of {plain} MiB"


def test_chunks_are_within_a_budget() -> None:
    assert chunk_rows(8192, 8192, 2) == 2048
    assert chunk_rows(8192, 128256, 4) == MIN_CHUNK_ROWS
    assert chunk_rows(100, 50, 4) == 100
    assert chunk_rows(0, 50, 4) == 1
    assert chunked.chunk_rows(8192, 128256, "cuda") == 523
    assert chunked.chunk_rows(8192, 128256, "cpu") == chunked.MIN_CHUNK_ROWS
    assert chunked.chunk_rows(100, 50, "cuda") == 100
    assert chunked.chunk_rows(0, 50, "cuda") == 0


def test_libraries_that_are_not_installed_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, package in ((liger, "liger_kernel"), (cce, "cut_cross_entropy")):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        assert f"the package {package} is not installed" in str(module.unavailable())
    hidden, weight, labels = case(4)
    with pytest.raises(KernelUnavailable, match="'liger' cannot run on cpu"):
        linear_cross_entropy(hidden, weight, labels, backend="liger")
    assert OP.choose("auto", "cpu") == next(name for name, reason in OP.status("cpu").items() if reason is None)
    assert OP.choose("auto", "cuda") == "chunked"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "liger", "cce"])
@pytest.mark.parametrize("mask", ["none", "fractions"])
def test_on_a_gpu(backend: str, mask: str) -> None:
    if (reason := OP.status("cuda")[backend]) is not None:
        pytest.skip(f"{backend}: {reason}")
    given = [t.detach().to("cuda", torch.bfloat16) for t in (torch.randn(300, 128), torch.randn(1000, 128) * 0.1)]
    labels, scale = torch.arange(300, device="cuda"), mask_of(mask, 300)
    results = []
    for name, dtype in ((backend, torch.bfloat16), ("reference", torch.float64)):
        hidden, weight = (t.to(dtype).requires_grad_() for t in given)
        loss, token_loss = linear_cross_entropy(hidden, weight, labels, None if scale is None else scale.cuda(), backend=name)
        results.append([loss, token_loss, *torch.autograd.grad(loss, (hidden, weight))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())
