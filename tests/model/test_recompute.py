"""Recomputation changes no loss, no count and no gradient, keeps less, and keeps its inputs as it was told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config.moe import MoEConfig
from megatron.model import GPT, build_cache
from megatron.model.recompute import MODULES, KeptInputs
from megatron.mpu.groups import Group
from megatron.testing.distributed import run_distributed
from tests.model.tiny_model import DENSE, model_section, moe_section, tiny_model, tokens

LAYERS = 3
ALL_LOSSES = {"load_balance": 0.1, "global_load_balance": 0.2, "joint_load_balance": 0.3, "z_loss": 0.01, "entropy": 0.02}
MODELS: dict[str, MoEConfig] = {
    "dense": DENSE,
    "mixtral": moe_section(moe_num_experts=4, moe_top_k=2, moe_expert_type="grouped", moe_losses=ALL_LOSSES, moe_jitter_eps=0.1),
    "structmoe": moe_section(moe_losses={**ALL_LOSSES, "lore_balance": 0.1}, moe_lore_top_k=2, moe_num_shared_experts=1),
    "decomposed": moe_section(moe_expert_type="decomposed", moe_decomposition_rank=6, moe_losses=ALL_LOSSES),
    "sinkhorn": moe_section(moe_router_type="sinkhorn", moe_losses=ALL_LOSSES),
    "local losses": moe_section(moe_losses={"load_balance": 0.1, "z_loss": 0.01, "lore_balance": 0.1}, moe_lore_top_k=2),
    "every second layer": moe_section(moe_expert_interval=2, moe_losses=ALL_LOSSES),
}
Enable = Callable[[GPT], None]
WAYS: dict[str, Enable] = {
    **{f"layers by {n}": lambda model, n=n: model.enable_activation_checkpointing(n) for n in (1, 2, LAYERS)},
    **{name: lambda model, name=name: model.recompute_modules([name]) for name in MODULES},
    "attention and experts": lambda model: model.recompute_modules(["attention", "experts"]),
    "on the CPU": lambda model: model.enable_activation_checkpointing(1, KeptInputs(on_cpu=True)),
}


def build(moe: MoEConfig, **changes: Any) -> GPT:
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    return tiny_model(model_section(num_layers=LAYERS, **{**dropout, **changes}), moe)


def step(model: GPT) -> list[Tensor]:
    """Losses, counts and gradients of two micro-batches; the second one is told the load of the first."""
    torch.manual_seed(3)
    found: list[Tensor] = []
    earlier = None
    for seed in (0, 1):
        text = tokens(seed=seed)
        out = model(text[:, :-1], labels_BS=text[:, 1:], earlier_load_XE=earlier)
        out.loss.backward()
        found += [out.loss.detach(), out.lm_loss.detach(), out.token_loss_BS, *(part.detach() for part in out.report)]
        earlier = out.report.expert_load_XE
    return found + [p.grad for p in model.parameters() if p.grad is not None] + [torch.rand(1)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_recomputation_changes_nothing(kind: str, way: str) -> None:
    """Bit for bit, with dropout, jitter and every auxiliary loss; the random numbers after the step are the same too."""
    plain = build(MODELS[kind])
    recomputed = copy.deepcopy(plain)
    WAYS[way](recomputed)
    check_same(step(recomputed), step(plain))


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(expected) == len(found) > 10
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)  # statistics of what was not sent are NaN


def count_forwards(part: nn.Module) -> list[int]:
    """A list that gets longer with each forward of the part."""
    forwards: list[int] = []
    part.register_forward_pre_hook(lambda module, given: forwards.append(1))
    return forwards


@pytest.mark.parametrize(
    ("name", "twice", "once"),
    [
        ("attention", "attention.dense", "mlp.router"),
        ("experts", "mlp.experts.lores", "mlp.router"),
        ("moe", "mlp.router", "attention.dense"),
    ],
)
def test_only_the_named_module_runs_twice(name: str, twice: str, once: str) -> None:
    model = build(moe_section())
    model.recompute_modules([name])
    again, alone = (count_forwards(model.layers[0].get_submodule(part)) for part in (twice, once))
    model(tokens(), labels_BS=tokens()).loss.backward()
    assert (len(again), len(alone)) == (2, 1)


def test_the_mlp_of_dense_layers_runs_twice() -> None:
    model = build(moe_section(moe_expert_interval=2))
    model.recompute_modules(["mlp"])
    dense = [not hasattr(layer.mlp, "router") for layer in model.layers]
    found = [
        count_forwards(layer.get_submodule("mlp.linear1" if is_dense else "mlp.router")) for layer, is_dense in zip(model.layers, dense, strict=True)
    ]
    model(tokens(), labels_BS=tokens()).loss.backward()
    assert [len(forwards) for forwards in found] == [2 if is_dense else 1 for is_dense in dense]
    assert len(set(dense)) == 2


def kept_bytes(model: GPT, length: int = 64) -> int:
    """Bytes that one forward keeps for the backward, without the weights."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    text = tokens(length=length + 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(text[:, :-1], labels_BS=text[:, 1:])
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    out.loss.backward()
    return total


def test_less_is_kept() -> None:
    """With none, chosen modules, layers: in this order. Layers by n keep one hidden state for n layers, and nothing else that grows with them."""
    sizes = {"num_layers": 4, "seq_length": 64, "max_position_embeddings": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    plain = tiny_model(model_section(**sizes), moe_section(moe_top_k=2))
    found = {}
    for way in ("none", "attention", "experts", "moe", "layers by 1", "layers by 2"):
        model = copy.deepcopy(plain)
        WAYS.get(way, lambda model: None)(model)
        found[way] = kept_bytes(model)
    hidden = 4 * 2 * 64 * 16
    assert found["attention"] < 0.95 * found["none"]
    assert found["experts"] < 0.8 * found["none"]
    assert found["moe"] < found["experts"]
    assert found["layers by 1"] < 0.5 * found["moe"]
    assert found["layers by 1"] - found["layers by 2"] == 2 * hidden


def test_generation_keeps_no_second_cache() -> None:
    """A cache is filled once even if the model is in training mode and gradients are on; in evaluation nothing is recomputed."""
    model = build(moe_section(), hidden_dropout=0.0, attention_dropout=0.0)
    expected = model(tokens()).logits_BSV
    model.recompute_modules(["attention", "moe"])
    cache = build_cache(model_section(num_layers=LAYERS), 2, 16)
    parts = [model(part, cache=cache).logits_BSV for part in tokens().split([5, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert cache[0].length == 9
    assert torch.equal(model.eval()(tokens()).logits_BSV, expected)


# ---------------------------------------------------------------- inputs divided among processes


def divided(kind: str) -> tuple[list[Tensor], list[int]]:
    """(what a step gives with inputs divided among all processes, numbers that each kept share has)."""
    model = build(MODELS[kind])
    world = torch.distributed.get_world_size()
    kept = KeptInputs(group=Group(tuple(range(world)), torch.distributed.get_rank(), torch.distributed.group.WORLD))
    sizes: list[int] = []
    keep = kept._keep

    def counted(whole: Tensor) -> Any:
        sizes.append((made := keep(whole)).share.untyped_storage().nbytes() // 4)
        return made

    kept._keep = counted  # type: ignore[method-assign]
    model.enable_activation_checkpointing(1, kept)
    return step(model), sizes


@pytest.mark.parametrize(("kind", "processes"), [("local losses", 2), ("dense", 3)])
def test_kept_inputs_are_divided_among_processes(kind: str, processes: int) -> None:
    """2 sequences of 8 tokens of width 16: 256 numbers, which three processes do not divide evenly."""
    expected = step(build(MODELS[kind]))
    results = run_distributed(divided, processes, kind)
    for found, sizes in results:
        assert sizes == [-(-256 // processes)] * (2 * LAYERS)
        check_same(found, expected)
