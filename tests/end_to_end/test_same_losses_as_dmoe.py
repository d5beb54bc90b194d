"""From the same weights and data as GPT-NeoX's dropless MoE (Gale et al.'s dMoE behind GPT-NeoX's routers) the loss of every step is the same: 50
steps in fp32 against a loop over experts around Hugging Face's model, from a checkpoint with GPT-NeoX's names.

Shapes: T tokens; D model width; E experts; K experts per token; F expert width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.checkpoint.upstream import head, write_sequential
from tests.end_to_end import neox_reference
from tests.end_to_end.test_same_losses_as_upstream import LAYERS, SETTINGS, WIDTH, args, documents, from_gpt_neox, gpt_neox, run

__all__ = ["documents"]
EXPERTS, EXPERT_WIDTH, ALLOWED = 4, 48, 1e-4


class DroplessMoE(nn.Module):
    """sum over the K experts of a token of weight * gelu(x W1^T) W2, without a loss."""

    def __init__(self, *, sinkhorn: bool, top_k: int) -> None:
        super().__init__()
        self.sinkhorn, self.top_k = sinkhorn, top_k
        self.router_ED = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH))
        self.w1_EFD = nn.Parameter(0.1 * torch.randn(EXPERTS, EXPERT_WIDTH, WIDTH))
        self.w2_EFD = nn.Parameter(0.1 * torch.randn(EXPERTS, EXPERT_WIDTH, WIDTH))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape."""
        x_TD = x_BSD.flatten(0, 1)
        logit_TE = x_TD @ self.router_ED.T
        score_TE = torch.sigmoid(logit_TE) if self.sinkhorn and self.top_k == 1 else torch.softmax(logit_TE, dim=1)
        chosen_TK = (balanced(logit_TE.detach()) if self.sinkhorn else score_TE).topk(self.top_k, dim=1).indices
        y_TD = torch.zeros_like(x_TD)
        for expert in range(EXPERTS):
            mine_T = (chosen_TK == expert).any(dim=1)
            out = nn.functional.gelu(x_TD[mine_T] @ self.w1_EFD[expert].T) @ self.w2_EFD[expert]
            y_TD = y_TD.masked_scatter(mine_T[:, None].expand_as(y_TD), y_TD[mine_T] + score_TE[mine_T, expert, None] * out)
        return y_TD.view(x_BSD.shape)


def balanced(logit_TE: Tensor) -> Tensor:
    """Sinkhorn as GPT-NeoX has it: columns start at 1 / (E * sum), 3 rounds, none after the columns moved by less than 1e-4 on average."""
    cost = logit_TE.exp()
    tokens, experts = cost.shape
    column = 1 / (experts * cost.sum(dim=0))
    for _ in range(3):
        row = 1 / (tokens * ((cost * column).sum(dim=1) + 1e-8))
        new = 1 / (experts * ((cost * row[:, None]).sum(dim=0) + 1e-8))
        moved, column = (new - column).abs().mean(), new
        if moved < 1e-4:
            break
    return column * cost * row[:, None]


def with_experts(moe_layers: list[int], *, sinkhorn: bool, top_k: int) -> nn.Module:
    """A GPT-NeoX with experts in these layers."""
    model = gpt_neox(parallel=False)
    for layer in moe_layers:
        model.gpt_neox.layers[layer].mlp = DroplessMoE(sinkhorn=sinkhorn, top_k=top_k)  # type: ignore[union-attr, index]
    return model


def upstreams_names(model: nn.Module) -> dict[str, Tensor]:
    """GPT-NeoX's names; experts lie below each other in two dimensions."""
    names = {"router_ED": "router.layer.weight", "w1_EFD": "experts.mlp.w1", "w2_EFD": "experts.mlp.w2"}
    state = {}
    for name, tensor in from_gpt_neox(model).items():
        *outer, last = name.split(".")
        state[".".join([*outer, names.get(last, last)])] = tensor.flatten(0, -2) if last in names else tensor
    return state


@pytest.mark.parametrize(
    ("router", "top_k", "interval"),
    [("sinkhorn", 1, 1), ("topk", 2, 2), ("sinkhorn", 2, 2)],
    ids=["sinkhorn", "topk every other layer", "sinkhorn of 2"],
)
def test_dropless_experts(tmp_path: Path, documents: list[np.ndarray], router: str, top_k: int, interval: int) -> None:
    model = with_experts(list(range(0, LAYERS, interval)), sinkhorn=router == "sinkhorn", top_k=top_k)
    values: dict[str, Any] = {"moe_num_experts": EXPERTS, "moe_top_k": top_k, "moe_router_type": router, "moe_expert_interval": interval}
    # GPT-NeoX's intermediate_size is the width of an expert as it is, and also that of dense layers, which are 4 * hidden_size here.
    values |= {"moe_ffn_hidden_size": EXPERT_WIDTH, "rotary_pct": 0.25}
    state = upstreams_names(model)
    assert state["sequential.2.mlp.experts.mlp.w1"].shape == (EXPERTS * EXPERT_WIDTH, WIDTH)
    write_sequential(tmp_path / "theirs", [state], head(7, args(1)))
    ours, theirs = run(values, tmp_path, documents), neox_reference.train(model, documents, SETTINGS)
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    assert len(differences) == 50
    assert max(differences) <= ALLOWED, f"step {int(np.argmax(differences)) + 1}: {max(differences):.2e}"
    assert theirs[-1] < 0.7 * theirs[0], "the model learned something that could have been different"
