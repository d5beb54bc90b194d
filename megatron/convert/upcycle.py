"""A dense model as a mixture of experts ("sparse upcycling", Komatsuzaki et al., 2023): every expert starts as a copy of the MLP.

LoREs start with B = 0 and so without effect. Where the weights of a token's experts sum to one, the new model computes what the old one did.
Shapes: E experts; F hidden width; D model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron.config import config_from_dict
from megatron.convert.architecture import Source
from megatron.convert.architectures.fit import router_kind
from megatron.convert.architectures.weights import FIRST_LAYER
from megatron.convert.errors import ConversionError
from megatron.model import build_model
from megatron.model.moe.layer import MoELayer

LINEAR = re.compile(r"sequential\.(\d+)\.mlp\.linear([12])\.(weight|bias)")
EXACT_ROUTERS = ("topk normalized", "sigmoid", "top_p")


@dataclass(frozen=True)
class Upcycled:
    """The sparse model: its keys and configuration; `is_exact`: it computes what the dense one did; sentences for the user."""

    keys: dict[str, Any]
    source: Source
    is_exact: bool
    notices: tuple[str, ...]

    def weights(self, dense: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The sparse model's weights from the dense one's, layer by layer. Raises ConversionError for biases that experts do not have."""
        model, moe = self.source.config.model, self.source.config.moe
        gpt = build_model(model, moe, 1, seed=self.source.config.training.seed)
        sections = moe.for_layers(model.num_layers)
        fresh = {FIRST_LAYER + i: layer.mlp for i, layer in enumerate(gpt.layers) if isinstance(layer.mlp, MoELayer)}
        for name, tensor in dense:
            match = LINEAR.fullmatch(name)
            if match is None or int(match[1]) not in fresh:
                yield name, tensor
            elif match[3] == "bias":
                if bool(tensor.any()):
                    raise ConversionError(f"{name} is not zero, and experts have no biases: this model cannot be upcycled.")
            elif match[2] == "1":
                layer = f"sequential.{match[1]}.mlp"
                experts = sections[int(match[1]) - FIRST_LAYER].num_experts
                yield from ((f"{layer}.experts.mlp.{which}", part) for which, part in _first(tensor, experts, gated=model.is_gated))
                yield from _fresh_weights(fresh[int(match[1])], layer, tensor)
            else:
                experts = sections[int(match[1]) - FIRST_LAYER].num_experts
                yield f"sequential.{match[1]}.mlp.experts.mlp.w2", tensor.t().repeat(experts, 1)


def upcycle(dense: Source, changes: Mapping[str, Any], keys: Mapping[str, Any]) -> Upcycled:
    """`changes`: the keys that ask for experts; `keys`: those of the dense model. Raises ConversionError where copies of the MLP cannot be experts,
    and ConfigError."""
    if foreign := sorted(key for key in changes if not key.startswith("moe_")):
        raise ConversionError(f"--upcycle: {foreign[0]} is no key of experts (moe_...): what else is to change belongs into the configuration later.")
    structmoe = changes.get("moe_expert_type") == "structmoe"
    merged = {**keys, **changes, **({"moe_lore_init": "zero"} if structmoe else {})}
    config = config_from_dict(merged)
    moe, width = config.moe, dense.config.model.mlp_width
    problems = [
        (dense.config.moe.has_experts, "the model has experts already"),
        (not moe.has_experts, "moe_num_experts must be 2 or more"),
        (moe.moe_expert_type not in ("grouped", "structmoe"), f"moe_expert_type {moe.moe_expert_type}: an MLP is no product of thin matrices"),
        (bool(moe.shared_width(config.model)) or moe.moe_use_residual, "a shared or residual expert beside the copies would change the output"),
        (structmoe and moe.moe_lore_interaction == "gated", "moe_lore_interaction gated: LoREs with B = 0 would multiply the output by zero"),
        (moe.moe_router_type == "expert_choice", "moe_router_type expert_choice: some tokens would have no expert"),
        (moe.expert_width(config.model) != width, f"an expert must be as wide as the MLP: set moe_ffn_hidden_size to {width}"),
    ]
    if problem := next((sentence for wrong, sentence in problems if wrong), None):
        raise ConversionError(f"--upcycle: {problem}.")
    exact = _sums_to_one(config.moe)
    why = "The weights of a token's experts do not sum to one (moe_normalize_top_k: true would make them): the logits differ from the dense model's."
    return Upcycled(merged, Source(config, dense.vocabulary), exact, () if exact else (why,))


def _sums_to_one(moe: Any) -> bool:
    kind, scaled = router_kind(moe), moe.moe_router_type in ("topk", "sigmoid") and moe.moe_router_topk_scaling_factor != 1.0
    return not scaled and kind in EXACT_ROUTERS and (kind == "topk normalized" or moe.moe_normalize_top_k)


def _first(weight: Tensor, experts: int, *, gated: bool) -> Iterator[tuple[str, Tensor]]:
    """linear1, [up ; gate] where it has a gate, once for each expert."""
    up, *gate = weight.chunk(2) if gated else (weight,)
    yield "w1", up.repeat(experts, 1)
    if gate:
        yield "w3", gate[0].repeat(experts, 1)


def _fresh_weights(mlp: nn.Module, layer: str, like: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the dense model has nothing like: routers and LoREs, as a new model starts, with B = 0."""
    for name, tensor in mlp.state_dict().items():
        if not name.startswith("experts.mlp."):
            yield f"{layer}.{name}", tensor if name.endswith("balance.bias") else tensor.to(like.dtype)
