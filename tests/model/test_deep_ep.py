"""DeepEP as a transport, against our exchange of rows. A stand-in over gloo takes the package's place (`deep_ep_stand_in.py`).

The real package has never run here.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config.moe import MoEConfig
from megatron.kernels.dispatch import OP, deep_ep
from megatron.kernels.registry import KernelUnavailable
from megatron.model import build_model
from megatron.model.divide import Divider
from megatron.model.initialization import build_initializer
from megatron.model.moe.dispatch.all_to_all import AllToAllDispatcher
from megatron.model.moe.dispatch.transport import ExpertShare
from megatron.model.moe.experts.structmoe import build_structmoe
from megatron.model.moe.routing import Routing
from megatron.mpu.groups import Groups, make_groups
from megatron.mpu.topology import Layout, current_topology
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_MOE, tiny_config
from tests.model import deep_ep_stand_in
from tests.model.deep_ep_stand_in import Settings

EXPERTS, WIDTH = 4, 256
CASES = ["one process gets all", "nothing from the second process", "uneven", "empty places"]


def installed(kind: str, number_format: torch.dtype = torch.float64) -> None:
    """The stand-in, and the op that would refuse a CPU."""
    deep_ep_stand_in.install(kind, number_format)
    OP._known["deep_ep"] = dataclasses.replace(OP._known["deep_ep"], devices=frozenset({"cpu"}), unavailable=lambda: None)


def routing_of(case: str, rank: int) -> Routing:
    """Different tokens on each process; float32 weights, as the package sends no others."""
    draws = torch.Generator().manual_seed(rank)
    scores = torch.rand(0 if case == "nothing from the second process" and rank == 1 else 5 + rank, EXPERTS, generator=draws)
    if case == "one process gets all":
        scores[:, :2] = -1
    expert_TK = scores.topk(2).indices
    if case == "empty places":
        expert_TK[::2, 1] = EXPERTS
        expert_TK[1] = EXPERTS
    weight_TK = torch.rand(expert_TK.shape, generator=draws).double() * (expert_TK < EXPERTS)
    return Routing(expert_TK, weight_TK, torch.zeros(0), torch.zeros(0), padded=case == "empty places")


def share_of(moe: MoEConfig, groups: Groups, experts: torch.nn.Module) -> ExpertShare:
    """Keeps this process's part of the experts."""
    share = ExpertShare(moe.num_experts, groups.expert, groups.tensor)
    for parameter in experts.parameters():
        rows = parameter.shape[0] // EXPERTS
        parameter.data = parameter.data[share.first * rows : (share.first + share.here) * rows].clone()
    for module in experts.modules():
        if hasattr(module, "num_experts"):
            module.num_experts = share.here
    return share


def computed(backend: str, groups: Groups, case: str, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output, counts, LoREs' counts and sums, and the gradients of tokens, weights and experts."""
    config = tiny_config({**TINY_MOE, "hidden_size": WIDTH, "moe_expert_type": "structmoe", "moe_num_lores": 3, "moe_lore_rank": 4})
    moe = config.moe.model_copy(update={"kernel_backends": {"dispatch": backend}})
    experts = build_structmoe(config.model, moe, build_initializer(config.model, 1)).to(device, dtype)
    share, routing = share_of(moe, groups, experts), routing_of(case, groups.expert.rank)
    x_TD = torch.randn(len(routing.expert_TK), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9 + groups.expert.rank))
    x_TD, weight_TK, done = x_TD.to(device, dtype).requires_grad_(), routing.weight_TK.to(device).requires_grad_(), []
    dispatcher = AllToAllDispatcher(moe, share)
    routing = routing._replace(expert_TK=routing.expert_TK.to(device), weight_TK=weight_TK * 1)
    found = dispatcher.run_while(x_TD * 1, routing, experts, lambda: done.append(1))
    assert done == [1]
    assert found.lores is not None
    assert found.lores.total_EM is not None
    (found.y_TD.square().sum() + found.lores.total_EM.square().sum()).backward()
    gradients = [x_TD.grad, weight_TK.grad, *(parameter.grad for parameter in experts.parameters())]
    own_TK = weight_TK.detach() > 0
    assert weight_TK.grad is not None
    assert (weight_TK.grad[~own_TK] == 0).all()
    return [found.y_TD.detach(), found.rows_E, found.lores.rows_G, found.lores.total_EM.detach(), *gradients]


def compared(kind: str, layout: Layout) -> None:
    installed(kind)
    groups = make_groups(current_topology(layout))
    for case in CASES:
        for number, (got, wanted) in enumerate(zip(*(computed(backend, groups, case) for backend in ("deep_ep", "reference")), strict=True)):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6, msg=lambda m, at=(case, number): f"{at}: {m}")
    assert len(Settings.calls) == 1  # the buffer was opened, once


@pytest.mark.parametrize("kind", ["EPBuffer", "ElasticBuffer", "Buffer"])
def test_two_processes_compute_the_same(kind: str) -> None:
    run_distributed(compared, 2, kind, Layout(expert=2))


@pytest.mark.parametrize("kind", ["EPBuffer", "Buffer"])
@pytest.mark.parametrize("layout", [Layout(expert=4), Layout(tensor=2, expert=2)], ids=["experts", "both"])
def test_four_processes_do_too(kind: str, layout: Layout) -> None:
    run_distributed(compared, 4, kind, layout)


def rounded(kind: str) -> None:
    """In bfloat16, with its checks on: a whole model in its own format, whose sums are rounded once more."""
    installed(kind, torch.bfloat16)
    found = []
    for backend in ("deep_ep", "reference"):
        keys = {**TINY_MOE, "hidden_size": WIDTH, "precision": "bfloat16", "moe_expert_parallel_size": 2, "moe_num_shared_experts": 1}
        config = tiny_config({**keys, "kernel_backends": {"dispatch": backend}})
        divider = Divider(make_groups(current_topology(Layout(expert=2))))
        model = build_model(config.model, config.moe, 64, seed=1, divider=divider).bfloat16()
        text = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
        loss = model(text, labels_BS=text).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.02 * wanted.abs().max().item())


@pytest.mark.parametrize("kind", ["EPBuffer", "Buffer"])
def test_a_model_in_bfloat16(kind: str) -> None:
    run_distributed(rounded, 2, kind)


def as_the_package_is_tested(kind: str) -> None:
    """What the package's own tests assert (tests/test_intranode.py, tests/ep/test_ep.py, tests/elastic/test_combine_topk_weights.py)."""
    installed(kind, torch.bfloat16)
    groups = make_groups(current_topology(Layout(expert=2)))
    rank, here = groups.expert.rank, EXPERTS // 2
    buffer = deep_ep.open_buffer(groups.expert.handle, deep_ep.Sizes(WIDTH, 2, 8))
    topk_idx = torch.tensor([[0, 1], [3, 2], [1, 3], [2, -1], [-1, -1]])
    x_TD = (torch.arange(5)[:, None] + 8 * rank).expand(5, WIDTH).bfloat16().contiguous()
    weight_TK = torch.rand(5, 2)
    sent = buffer.dispatch(x_TD, topk_idx, weight_TK, EXPERTS)
    sent.event.current_stream_wait()
    tokens = [0, 2] if rank == 0 else [1, 2, 3]
    assert sent.x_SD[:, 0].tolist() == [token + 8 * sender for sender in range(2) for token in tokens]
    assert sent.expert_SK.min() >= -1
    assert sent.expert_SK.max() < here
    assert torch.bincount(sent.expert_SK[sent.expert_SK >= 0], minlength=here).tolist() == [
        2 * int((topk_idx == here * rank + i).sum()) for i in (0, 1)
    ]
    assert torch.equal(buffer.dispatch_again(x_TD, sent.handle), sent.x_SD)
    in_rank = torch.stack([((topk_idx >= 0) & (topk_idx // here == r)).any(1) for r in range(2)], 1)
    combined_TD, combined_TK = buffer.combine(sent.x_SD, sent.weight_SK, sent.handle)
    assert torch.equal(combined_TD, x_TD * in_rank.sum(1, keepdim=True))
    assert combined_TK is not None
    assert torch.equal(combined_TK, weight_TK * (topk_idx >= 0))
    local = torch.where(sent.expert_SK >= 0, torch.tensor([11.0, 22.0]), 0.0)  # as gradients are: only where the experts are here
    assert torch.equal(buffer.combine(sent.x_SD, local, sent.handle)[1], torch.where(topk_idx >= 0, torch.tensor([11.0, 22.0]), 0.0))


@pytest.mark.parametrize("kind", ["EPBuffer", "Buffer"])
def test_the_stand_in_does_what_the_tests_of_the_package_ask(kind: str) -> None:
    run_distributed(as_the_package_is_tested, 2, kind)


def grown() -> list[str]:
    """Tokens of the largest of the processes, rounded up, and never less than before."""
    installed("EPBuffer")
    groups = make_groups(current_topology(Layout(expert=2)))
    for tokens in (3, 4, 2, 9):
        deep_ep.shared_buffer(groups.expert.handle).of(deep_ep.Sizes(WIDTH, 2, tokens))
    return Settings.calls


def test_the_buffer_grows_with_the_tokens() -> None:
    assert run_distributed(grown, 2)[0] == [f"EPBuffer 4 {WIDTH} 2", f"EPBuffer 16 {WIDTH} 2"]


class Refusing:
    """A buffer that cannot be opened."""

    def __init__(self, *given: Any, **named: Any) -> None:
        raise AssertionError("GPU 0 and GPU 1 are not connected via NVLink")


class TwoProcesses:
    """A process group, as far as it is looked at."""

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"EPBuffer": Refusing}, r"cannot open a buffer for 2 processes \(GPU 0 and GPU 1 are not connected via NVLink\); remove dispatch from"),
        ({}, "the installed deep_ep has none of EPBuffer, ElasticBuffer and Buffer; remove dispatch from kernel_backends"),
    ],
)
def test_a_buffer_that_cannot_be_opened_is_a_sentence(kinds: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("deep_ep")
    vars(package).update(kinds)
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    with pytest.raises(KernelUnavailable, match=message):
        deep_ep.open_buffer(TwoProcesses(), deep_ep.Sizes(WIDTH, 2, 4))


@pytest.mark.parametrize(
    ("found", "capability", "reason"),
    [
        (False, None, "the package deep_ep is not installed; its page github.com/deepseek-ai/DeepEP says how to build it"),
        (True, (8, 0), "deep_ep needs GPUs of compute capability 9.0 or newer, and this one has 8.0"),
        (True, (9, 0), None),
        (True, None, None),
    ],
)
def test_what_is_missing_is_said(found: bool, capability: tuple[int, int] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_ep, "find_spec", lambda name: object() if found else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert deep_ep.unavailable() == reason


def on_gpus() -> None:
    """The package itself. Its sums are rounded once more than ours."""
    torch.cuda.set_device(torch.distributed.get_rank())
    groups = make_groups(current_topology(Layout(expert=torch.distributed.get_world_size())))
    for case in CASES:
        both = [computed(backend, groups, case, "cuda", torch.bfloat16) for backend in ("deep_ep", "reference")]
        for number, (got, wanted) in enumerate(zip(*both, strict=True)):
            most = wanted.abs().max().item() if wanted.numel() else 0.0
            torch.testing.assert_close(got.double(), wanted.double(), rtol=5e-2, atol=3e-2 * most, msg=lambda m, at=(case, number): f"{at}: {m}")


@pytest.mark.gpu
def test_the_package_itself() -> None:
    if (reason := OP.status("cuda")["deep_ep"]) is not None:
        pytest.skip(f"deep_ep: {reason}")
    if torch.cuda.device_count() < 2:
        pytest.skip("DeepEP needs two GPUs; this machine has one")
    run_distributed(on_gpus, 2, backend="nccl")
