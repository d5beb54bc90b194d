"""The fused output projection and cross entropy against PyTorch's own on all logits at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.kernels.linear_cross_entropy import OP, cce, chunked, liger, linear_cross_entropy
from megatron.kernels.registry import KernelUnavailable

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def case(tokens: int, dtype: torch.dtype = torch.float64, vocabulary: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 12, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 12, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def mask_of(kind: str, tokens: int) -> Tensor | None:
    fractions = torch.rand(tokens, generator=torch.Generator().manual_seed(1))
    return {"none": None, "binary": (fractions > 0.5).float(), "fractions": fractions}[kind]


@pytest.fixture(params=[1, 7 * 37, 2**22], ids=["minimum", "seven", "one_chunk"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", request.param)
    monkeypatch.setattr(chunked, "MIN_CHUNK_ROWS", 3)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", ["none", "binary", "fractions"])
def test_equals_the_plain_definition(dtype: torch.dtype, mask: str) -> None:
    hidden, weight, labels = case(23, dtype)
    ours, token_loss = linear_cross_entropy(hidden, weight, labels, mask_of(mask, 23))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    plain, plain_token_loss = linear_cross_entropy(*wide, labels, mask_of(mask, 23), backend="reference")
    tolerance = TOLERANCE[dtype]
    assert ours.dtype == token_loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(ours.double(), plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(token_loss.double(), plain_token_loss, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(torch.autograd.grad(3 * ours, (hidden, weight)), torch.autograd.grad(3 * plain, wide), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_the_plain_definition_is_pytorchs() -> None:
    hidden, weight, labels = case(9)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, labels, backend="reference")[0], torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)
    )


def test_gradcheck() -> None:
    hidden, weight, labels = case(5, vocabulary=6)
    mask = mask_of("fractions", 5)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, mask)[0], (hidden, weight))


def test_a_token_that_is_impossible_has_a_finite_loss() -> None:
    hidden, weight = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == 2000.0


def test_all_masked_is_zero_and_has_zero_gradients() -> None:
    hidden, weight, labels = case(4)
    loss, token_loss = linear_cross_entropy(hidden, weight, labels, torch.zeros(4))
    assert loss.item() == 0
    assert (token_loss > 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_only_the_gradients_that_are_wanted() -> None:
    hidden, weight, labels = case(4)
    assert linear_cross_entropy(hidden.detach(), weight, labels)[0].requires_grad
    (only,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), labels)[0], (hidden,))
    torch.testing.assert_close(only, torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], (hidden,))[0])


def test_without_gradients_only_the_losses_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = case(4)
    wanted = linear_cross_entropy(hidden, weight, labels)
    monkeypatch.setattr(chunked, "_subtract_labels", None)
    with torch.no_grad():
        loss, token_loss = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    assert torch.equal(loss, wanted[0])
    assert torch.equal(token_loss, wanted[1])


def test_a_retained_graph_gives_the_same_gradient_twice() -> None:
    hidden, weight, labels = case(4)
    loss = 2 * linear_cross_entropy(hidden, weight, labels)[0]
    first, second = (torch.autograd.grad(loss, (hidden,), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_tokens() -> None:
    hidden, weight, labels = case(0)
    assert linear_cross_entropy(hidden, weight, labels)[0].item() == 0


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
def test_the_loss_step_needs_a_fifth_of_the_memory(repository: Path) -> None:
    """8192 tokens of a vocabulary of 128256: gradients included, inputs not."""
    ours, plain = (peak(repository, 8192, 128256, backend) for backend in ("chunked", "reference"))
    assert ours <= plain / 5, f"{ours} MiB of {plain} MiB"


def test_a_gpu_takes_larger_chunks_within_a_budget() -> None:
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
    assert OP.choose("auto", "cpu") == OP.choose("auto", "cuda") == "chunked"


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
