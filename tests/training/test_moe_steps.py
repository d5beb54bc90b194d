"""One step with every auxiliary loss, over micro-batches and processes, against the losses' definitions and autograd by hand.

Shapes: T tokens; B sequences; S sequence; E experts; M LoREs per expert; R routed rows; P processes; A micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron.config.components import LOSSES
from megatron.config.loader import LoadedConfig
from megatron.model import GPT, build_model
from megatron.model.moe import LoreRouting, Routing
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import tiny_config
from tests.training.runs import losses_of, run_values, train_losses

TAU, RATE, VOCABULARY = 2.0, 0.5, 512
COEFFICIENTS = {name: 0.2 + 0.3 * i for i, name in enumerate(LOSSES)}
Micro = tuple[int, int]
"""A process and one of its micro-batches."""


class Taken(NamedTuple):
    """What one process saw of a step."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    texts: list[Tensor]
    """Of each micro-batch."""


def take_a_step(values: Mapping[str, Any]) -> Taken:
    from megatron.training import step
    from megatron.training.run import train

    original, before, texts = step.forward, {}, []

    def forward(engine: Any, batch: dict[str, Tensor], **settings: Any) -> Any:
        if not texts:
            before.update({name: weight.detach().clone() for name, weight in engine.module.named_parameters()})
        texts.append(batch["text"].clone())
        return original(engine, batch, **settings)

    step.forward = forward
    try:
        engine = train(LoadedConfig(tiny_config(values))).engine
    finally:
        step.forward = original
    return Taken(before, {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}, texts)


def step_values(corpus: Path, metrics: Path, router: str, accumulation: int) -> dict[str, Any]:
    plain = {"optimizer": {"type": "SGD", "params": {"lr": RATE}}, "weight_decay": 0.0, "gradient_clipping": 0.0, "lr_decay_style": "constant"}
    batch = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": accumulation, "train_iters": 1, "eval_iters": 0, "min_lr": RATE}
    losses = {"moe_losses": COEFFICIENTS, "moe_block_wise_temperature": TAU, "moe_router_type": router}
    return {**run_values(corpus, None), **plain, **batch, **losses, "metrics_file": str(metrics)}


def balance_values(corpus: Path, metrics: Path, **changes: Any) -> dict[str, Any]:
    keys = {"moe_losses": {"global_load_balance": 0.1}, "train_batch_size": 4, "train_iters": 6, "eval_iters": 0}
    return {**run_values(corpus, None), "moe_expert_type": "grouped", **keys, "metrics_file": str(metrics), **changes}


def run_both(balance: Mapping[str, Any], one_step: Mapping[str, Any]) -> tuple[list[float], Taken]:
    """Both runs of two processes in one start of them."""
    return train_losses(balance), take_a_step(one_step)


class OfTwo(NamedTuple):
    """What two processes brought home, and the folder of their metrics."""

    balance_losses: list[float]
    taken: list[Taken]
    folder: Path


@pytest.fixture(scope="module")
def of_two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> OfTwo:
    folder = tmp_path_factory.mktemp("two")
    parallel = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    balance = {key: value for key, value in balance_values(corpus, folder / "balance.jsonl", **parallel).items() if "lore" not in key}
    results = run_distributed(run_both, 2, balance, step_values(corpus, folder / "step.jsonl", "topk", 2), backend=None)
    return OfTwo(results[0][0], [taken for _, taken in results], folder)


def test_balance_over_the_global_batch_is_that_of_one_process(of_two: OfTwo, corpus: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    values = {key: value for key, value in balance_values(corpus, one, train_micro_batch_size_per_gpu=4).items() if "lore" not in key}
    assert of_two.balance_losses == pytest.approx(train_losses(values), abs=1e-5)
    key = "train/global_load_balance"
    assert losses_of(of_two.folder / "balance.jsonl", key) == pytest.approx(losses_of(one, key), abs=1e-5)


def of_layers(model: GPT, text: Tensor) -> tuple[Tensor, list[Routing], list[tuple[Tensor, LoreRouting]]]:
    """(language model loss, routings of the layers, with the rows of each expert and the LoREs' routings)."""
    routings: list[Routing] = []
    lores: list[tuple[Tensor, LoreRouting]] = []
    hooks = [layer.mlp.router.register_forward_hook(lambda _module, _given, routing: routings.append(routing)) for layer in model.layers]
    hooks += [layer.mlp.experts.register_forward_hook(lambda _module, given, made: lores.append((given[1], made[1]))) for layer in model.layers]
    text = text.long()
    loss = model(text[:, :-1].contiguous(), labels_BS=text[:, 1:].contiguous()).lm_loss
    for hook in hooks:
        hook.remove()
    assert loss is not None
    return loss, routings, lores


def chosen(routing: Routing) -> Tensor:
    """chosen_TE, 1.0 where the token uses the expert."""
    tokens, experts = routing.logit_TE.shape
    return torch.stack([(routing.expert_TK == e).any(1).float() for e in range(experts)], 1).view(tokens, experts)


def switch(chosen_TE: Tensor, probability_TE: Tensor, count_E: Tensor | None = None) -> Tensor:
    """E * sum of f P."""
    count_E = chosen_TE.sum(0) if count_E is None else count_E
    return len(count_E) * (count_E / count_E.sum() * probability_TE.mean(0)).sum()


def joint_balance(routings: list[Routing]) -> Tensor:
    """E * sum of F P, means over the tokens of all layers at once."""
    chosen_te = torch.cat([chosen(routing) for routing in routings])
    probability_te = torch.cat([routing.probability_TE / routing.probability_TE.sum(-1, keepdim=True) for routing in routings])
    return chosen_te.shape[1] * (chosen_te.mean(0) * probability_te.mean(0)).sum()


def block_wise(chosen_BSE: Tensor, logit_BSE: Tensor) -> Tensor:
    """CoSMoEs, equations 2 to 7; K is the mean number where tokens differ in it."""
    batch, length, _ = chosen_BSE.shape
    replaced = int((chosen_BSE[:, 1:] - chosen_BSE[:, :-1]).abs().sum()) // 2
    weight_BSE = torch.softmax(TAU * logit_BSE, -1)
    soft = (weight_BSE[:, 1:] - weight_BSE[:, :-1]).abs().sum() / (batch * length)
    return replaced / (chosen_BSE.sum().item() / length * (length - 1)) * soft


def neighbours(chosen_BSE: Tensor, logit_BSE: Tensor) -> Tensor:
    """The cross entropy of each token's router with the choices of the tokens beside it."""
    log_BSE = torch.log(torch.softmax(TAU * logit_BSE, -1))
    total = (chosen_BSE[:, :-1] * log_BSE[:, 1:]).sum() + (chosen_BSE[:, 1:] * log_BSE[:, :-1]).sum()
    return -total / (chosen_BSE[:, :-1].sum() + chosen_BSE[:, 1:].sum())


def lore_balance(rows_E: Tensor, lores: LoreRouting) -> Tensor:
    total, first = torch.zeros(()), 0
    for rows in rows_E.tolist():
        probability_rM, lore_rL = lores.probability_RM[first : first + rows], lores.lore_RL[first : first + rows]
        first += rows
        if rows:
            share_M = torch.bincount(lore_rL.flatten(), minlength=probability_rM.shape[1]) / lore_rL.numel()
            total = total + rows / int(rows_E.sum()) * len(share_M) * (share_M * probability_rM.mean(0)).sum()
    return total


def losses_by_definition(routing: Routing, lores: tuple[Tensor, LoreRouting], batch: int, count_E: Tensor) -> dict[str, Tensor]:
    """`count_E`: of the step so far, over all processes."""
    chosen_TE, probability_TE = chosen(routing), routing.probability_TE / routing.probability_TE.sum(-1, keepdim=True)
    by_sequence = zip(chosen_TE.chunk(batch), probability_TE.chunk(batch), strict=True)
    return {
        "load_balance": switch(chosen_TE, probability_TE),
        "heterogeneous_load_balance": switch(chosen_TE, probability_TE),  # without zero, copy or constant experts it is the same
        "sequence_load_balance": torch.stack([switch(*one) for one in by_sequence]).mean(),
        "global_load_balance": switch(chosen_TE, probability_TE, count_E),
        "block_wise_selection": block_wise(*(part.unflatten(0, (batch, -1)) for part in (chosen_TE, routing.logit_TE))),
        "neighbour_selection": neighbours(*(part.unflatten(0, (batch, -1)) for part in (chosen_TE, routing.logit_TE))),
        "lore_balance": lore_balance(*lores),
        "entropy": -(probability_TE * probability_TE.log()).sum(-1).mean(),
        "z_loss": torch.logsumexp(routing.logit_TE, -1).square().mean(),
    }


def by_hand(values: Mapping[str, Any], taken: list[Taken]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(the weights after the step, each loss as it should be logged)."""
    config = tiny_config(values)
    model = build_model(config.model, config.moe, VOCABULARY, seed=1).train()
    model.load_state_dict({**model.state_dict(), **taken[0].before})
    micros: list[Micro] = list(itertools.product(range(len(taken)), range(len(taken[0].texts))))
    with torch.no_grad():
        counts = {(p, a): [chosen(routing).sum(0) for routing in of_layers(model, taken[p].texts[a])[1]] for p, a in micros}
    total, logged = torch.zeros(()), dict.fromkeys(COEFFICIENTS, 0.0)
    for process, micro in micros:
        loss, routings, lores = of_layers(model, taken[process].texts[micro])
        for layer, (routing, second) in enumerate(zip(routings, lores, strict=True)):
            so_far = torch.stack([counts[p, a][layer] for p, a in micros if a <= micro]).sum(0)
            for name, value in losses_by_definition(routing, second, len(taken[process].texts[micro]), so_far).items():
                loss = loss + COEFFICIENTS[name] * value
                logged[name] += value.item() / len(micros)
        joint = joint_balance(routings)
        logged["joint_load_balance"] += joint.item() / len(micros)
        total = total + (loss + COEFFICIENTS["joint_load_balance"] * joint) / len(micros)
    total.backward()
    return {name: weight.detach() - RATE * weight.grad for name, weight in model.named_parameters() if weight.grad is not None}, logged


def check(values: Mapping[str, Any], taken: list[Taken], metrics: Path) -> None:
    weights, logged = by_hand(values, taken)
    assert weights.keys() == taken[0].after.keys()
    for one in taken:
        for name, weight in weights.items():
            torch.testing.assert_close(one.after[name], weight, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    moved = [float((taken[0].after[name] - taken[0].before[name]).abs().max()) for name in weights if "router" in name]
    assert min(moved) > 1e-4, "the losses reach the routers"
    for name, value in logged.items():
        assert losses_of(metrics, f"train/{name}") == pytest.approx([value], abs=1e-5), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("router", ["topk", "sinkhorn", "sigmoid", "top_p", "expert_choice", "quantile_balancing", "expert_threshold", "recurrent"])
def test_a_step_of_three_micro_batches(router: str, recompute: bool, corpus: Path, tmp_path: Path) -> None:
    values = {**step_values(corpus, tmp_path / "m.jsonl", router, 3), "checkpoint_activations": recompute}
    check(values, [take_a_step(values)], tmp_path / "m.jsonl")


def test_a_step_of_two_processes_with_two_micro_batches_each(of_two: OfTwo, corpus: Path) -> None:
    assert not torch.equal(of_two.taken[0].texts[0], of_two.taken[1].texts[0])
    check(step_values(corpus, of_two.folder, "topk", 2), of_two.taken, of_two.folder / "step.jsonl")
