"""What the implementations are compared with: the same result from PyTorch's `grouped_mm`, Hugging Face's experts, and a dense product with as many
operations. Shapes as in `shapes.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_bench.machine import Call
from moe_bench.rooflines import lore_flops
from moe_bench.shapes import Inputs, Routed

ACTIVATIONS = {"gelu": functional.gelu, "silu": functional.silu}


def grouped_mm_hidden(inputs: Inputs, routed: Routed, x_RD: Tensor) -> Tensor:
    """The hidden layer of the experts; each product is one call of `grouped_mm`."""
    act, offsets_E = ACTIVATIONS[inputs.shape.activation], routed.offsets_E
    up_RF = functional.grouped_mm(x_RD, inputs.up_EFD.mT, offs=offsets_E)
    if routed.choice is not None:
        assert inputs.a_GQD is not None
        assert inputs.b_GQF is not None
        pi_RL, order = routed.choice
        offsets_G = order.rows_G.cumsum(0).to(torch.int32)
        u_NQ = functional.grouped_mm(x_RD.index_select(0, order.order_R // pi_RL.shape[1]), inputs.a_GQD.mT, offs=offsets_G)
        pi_N1 = pi_RL.reshape(-1).index_select(0, order.order_R)[:, None].to(u_NQ.dtype)
        y_NF = functional.grouped_mm(u_NQ * pi_N1, inputs.b_GQF, offs=offsets_G)
        up_RF = up_RF + y_NF.index_select(0, order.inverse_TK.reshape(-1)).view(*pi_RL.shape, -1).sum(1)
    if inputs.gate_EFD is None:
        return act(up_RF)
    return act(functional.grouped_mm(x_RD, inputs.gate_EFD.mT, offs=offsets_E)) * up_RF


def dense_hidden(inputs: Inputs, routed: Routed) -> tuple[Tensor, Tensor]:
    """(x, weight) of one dense product with as many operations as the hidden layer."""
    s = routed.sizes
    width = max(1, round(lore_flops(s) / (2 * s.rows * s.width_out)))
    return inputs.draw(s.rows, width).requires_grad_(), inputs.draw(s.width_out, width).requires_grad_()


def huggingface_experts(inputs: Inputs, implementation: str) -> Any:
    """MixtralExperts with the weights of `inputs`."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    s = inputs.shape
    config = MixtralConfig(hidden_size=s.width_in, intermediate_size=s.width_out, num_local_experts=s.experts, num_experts_per_tok=s.top_k)
    config._experts_implementation = implementation
    experts = MixtralExperts(config).to(inputs.device, inputs.dtype)
    assert inputs.gate_EFD is not None
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat([inputs.gate_EFD, inputs.up_EFD], 1))
        experts.down_proj.copy_(inputs.down_EFD.mT)
    return experts


def with_backward(forward: Any, needs: list[Tensor]) -> Call:
    """Forward, then the gradients of everything in `needs`. The weights count as changed, as after an optimizer step: what an implementation keeps of
    them from the step before is of no use."""
    grad = torch.ones_like(forward().detach())

    def call() -> object:
        torch.autograd.graph.increment_version([t for t in needs if t.ndim == 3])
        return torch.autograd.grad(forward(), needs, grad)

    return call


def without_backward(forward: Any) -> Call:
    """As in generation: weights do not change."""

    def call() -> object:
        with torch.no_grad():
            return forward()

    return call
