"""The table of docs/moe.md that says what other programs' coefficients are here: every row computed by its own formula, and by our losses.

The formulas were written from what the programs' documentation and sources say, in loops or plain sums.
Shapes: X layers with experts; B sequences; S tokens of each; T = B*S; E experts; K experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron.config.components import LOSSES, resolve_component
from megatron.model.moe import LossContext, Routing
from megatron.model.moe.losses.load_balance import expert_usage

B, S, E = 3, 8, 5
T = B * S
NUMBER = 0.02


class Batch(NamedTuple):
    """The routers' logits and choices; `all_layers`: with the dense ones."""

    logit_XTE: Tensor
    chosen_XTE: Tensor
    all_layers: int

    @property
    def top_k(self) -> int:
        return int(self.chosen_XTE[0, 0].sum())

    @property
    def probability_XTE(self) -> Tensor:
        return self.logit_XTE.softmax(-1)

    def parts(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """(chosen, probability) of each layer and each of `count` equal spans of tokens."""
        pairs = zip(self.chosen_XTE, self.probability_XTE, strict=True)
        return [(c, p) for chosen, probability in pairs for c, p in zip(chosen.chunk(count), probability.chunk(count), strict=True)]


def batch_of(layers: int, top_k: int) -> Batch:
    """Skewed routers, each layer with other favourites."""
    generator = torch.Generator().manual_seed(10 * layers + top_k)
    logit_XTE = torch.randn(layers, T, E, generator=generator, dtype=torch.float64) + 2 * torch.randn(layers, 1, E, generator=generator).double()
    chosen_XTE = torch.zeros(layers, T, E, dtype=torch.float64).scatter_(2, logit_XTE.topk(top_k, -1).indices, 1.0)
    return Batch(logit_XTE, chosen_XTE, layers + 3)


def transformers(b: Batch) -> Tensor:
    """One mean over the rows of all layers; a row counts K choices."""
    tokens_per_expert = b.chosen_XTE.reshape(-1, E).mean(0)
    return E * (tokens_per_expert * b.probability_XTE.reshape(-1, E).mean(0)).sum()


def megatron(b: Batch, spans: int = 1) -> Tensor:
    """sum(probabilities summed * tokens per expert) * E / (K * T * T), of each layer and span."""
    total = torch.zeros((), dtype=torch.float64)
    for chosen, probability in b.parts(spans):
        tokens = len(chosen)
        total = total + (probability.sum(0) * chosen.sum(0)).sum() * E / (b.top_k * tokens * tokens) / spans
    return total


def megablocks(b: Batch) -> Tensor:
    """One dot product of all layers' counts and mean scores, E / (X * T * K) times."""
    counts, scores = b.chosen_XTE.sum(1).flatten(), b.probability_XTE.mean(1).flatten()
    return E / (len(b.logit_XTE) * T * b.top_k) * torch.dot(counts, scores)


def z(b: Batch) -> Tensor:
    """Of each layer."""
    return torch.stack([torch.log(torch.exp(logit).sum(-1)).square().sum() / T for logit in b.logit_XTE])


def olmo_core(b: Batch, spans: int = 1) -> Tensor:
    """(E * weight / L) / (T * K) * the sum of counts times mean scores."""
    return sum((c.sum(0) * p.mean(0)).sum() for c, p in b.parts(spans)) * E / b.all_layers / (T * b.top_k)


def deepspeed(b: Batch, counted: int) -> Tensor:
    """mean(me * ce) * E * E / counted, ce over the first `counted` choices."""
    total = torch.zeros((), dtype=torch.float64)
    for logit, probability in zip(b.logit_XTE, b.probability_XTE, strict=True):
        first = torch.zeros_like(probability).scatter_(1, logit.topk(counted, -1).indices, 1.0)
        total = total + (probability.mean(0) * first.mean(0)).mean() * E * E / counted
    return total


def switch(b: Batch) -> Tensor:
    return sum(E * sum(c[:, e].sum() / c.sum() * p[:, e].mean() for e in range(E)) for c, p in b.parts(1))


def deepseek(b: Batch) -> Tensor:
    """f_i = E / (K S) * tokens that chose i; P_i the mean score; summed over experts, averaged over sequences."""
    total = torch.zeros((), dtype=torch.float64)
    for chosen, probability in b.parts(B):
        total = total + ((E / (b.top_k * S) * chosen.sum(0)) * probability.mean(0)).sum() / B
    return total


Definition = Callable[[Batch], Tensor]
DEFINITIONS: dict[str, Definition] = {
    "transformers, `router_aux_loss_coef`": transformers,
    "Megatron-Core, `moe_aux_loss_coeff`, `aux_loss`": megatron,
    "Megatron-Core, `moe_aux_loss_coeff`, `seq_aux_loss`": lambda b: megatron(b, B),
    "Megatron-Core, `moe_aux_loss_coeff`, `global_aux_loss`": megatron,  # one process, one micro-batch
    "Megatron-Core, `moe_z_loss_coeff`": lambda b: z(b).sum(),
    "StructMoE's author's fork, `moe_aux_loss_coeff`": lambda b: sum(E / (T * b.top_k) * (c.sum(0) * p.mean(0)).sum() for c, p in b.parts(1)),
    "MegaBlocks, `moe_loss_weight`": megablocks,
    "MegaBlocks, `moe_zloss_weight`": lambda b: z(b).sum(),
    "OLMoE's training, `moe_loss_weight`": megablocks,
    "OLMoE's training, `moe_zloss_weight`": lambda b: (torch.logsumexp(b.logit_XTE, -1) ** 2).sum() / (len(b.logit_XTE) * T * b.top_k),
    "OLMo-core, `lb_loss_weight`": olmo_core,
    "OLMo-core, `lb_loss_weight`, `instance`": lambda b: olmo_core(b, B),
    "OLMo-core, `z_loss_weight`": lambda b: torch.logsumexp(b.logit_XTE, -1).square().sum() / b.all_layers / T,
    "DeepSpeed-MoE, `moe_loss_coeff`, K = 1 or K > 2": lambda b: deepspeed(b, b.top_k),
    "DeepSpeed-MoE, `moe_loss_coeff`, K = 2": lambda b: deepspeed(b, 1),
    "Switch Transformers, alpha": switch,
    "DeepSeek-V2, alpha 1": deepseek,
}
HERE = re.compile(r"`(\w+): ([cXLK0-9 /*()]+)`")


@pytest.fixture(scope="module")
def rows(repository: Path) -> dict[str, tuple[str, str]]:
    """Program and number -> (our loss, its coefficient as an expression), as docs/moe.md says."""
    section = (repository / "docs" / "moe.md").read_text().split("### Balance coefficients of other programs")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")][1:]
    found = {}
    for name, _, here in cells:
        match = HERE.match(here)
        assert match, f"{name}: {here}"
        found[name] = (match[1], match[2])
    return found


def test_every_row_has_a_definition_here(rows: dict[str, tuple[str, str]]) -> None:
    assert set(rows) == set(DEFINITIONS)


def ours(name: str, b: Batch) -> Tensor:
    """The loss, summed over the layers as GPT does."""
    total, earlier_2E = torch.zeros((), dtype=torch.float64), None
    for logit_TE in b.logit_XTE:
        probability_TE = logit_TE.softmax(-1)
        expert_TK = logit_TE.topk(b.top_k, -1).indices
        routing = Routing(expert_TK, probability_TE.gather(1, expert_TK), probability_TE, logit_TE, batch_shape=(B, S))
        context = LossContext(E, b.top_k, num_layers=len(b.logit_XTE), earlier_usage_2E=earlier_2E)
        total = total + resolve_component(LOSSES, name)(routing, context)
        usage_2E = expert_usage(routing, E)
        earlier_2E = usage_2E if earlier_2E is None else earlier_2E + usage_2E
    return total


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_row_adds_the_same(name: str, rows: dict[str, tuple[str, str]]) -> None:
    """Values, and gradients of the routers' logits; with several numbers of layers and experts per token."""
    loss, expression = rows[name]
    top_ks = (2,) if name.endswith("K = 2") else (1, 3) if "DeepSpeed" in name else (1,) if "Switch" in name else (1, 2, 4)
    for layers in (1, 2, 5):
        for top_k in top_ks:
            drawn = batch_of(layers, top_k)
            logit_XTE = drawn.logit_XTE.clone().requires_grad_()
            b = drawn._replace(logit_XTE=logit_XTE)
            if name.endswith("K = 2"):
                b = b._replace(logit_XTE=torch.zeros_like(logit_XTE))  # P is even: the one place where it does not matter which choices f counts
            names = {"c": NUMBER, "X": layers, "L": b.all_layers, "K": top_k}
            coefficient = eval(expression, {"__builtins__": {}}, names)  # of [cXLK0-9 /*()] alone
            theirs, here = NUMBER * DEFINITIONS[name](b), coefficient * ours(loss, b)
            assert here.item() == pytest.approx(theirs.item(), rel=1e-12), (layers, top_k)
            if not name.endswith("K = 2"):
                one, other = (torch.autograd.grad(value, logit_XTE, retain_graph=True)[0] for value in (theirs, here))
                torch.testing.assert_close(one, other)


def test_the_two_forms_differ_where_layers_do() -> None:
    """Two layers that each use one expert, another one: each is as uneven as can be, and their mean less so."""
    logit_XTE = torch.zeros(2, T, E, dtype=torch.float64)
    logit_XTE[0, :, 0] = logit_XTE[1, :, 1] = 50.0
    b = Batch(logit_XTE, (logit_XTE > 1).double(), 2)
    assert ours("load_balance", b).item() / 2 == pytest.approx(E)
    assert ours("joint_load_balance", b).item() == pytest.approx(E / 2)
    alike = b._replace(logit_XTE=logit_XTE[:1].expand(2, -1, -1))
    assert ours("joint_load_balance", alike).item() == pytest.approx(ours("load_balance", alike).item() / 2)
