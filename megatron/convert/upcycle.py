"""A dense model as a mixture of experts ("sparse upcycling", Komatsuzaki et al., 2023): every expert starts as a copy of the MLP, or of a part of it.

    experts alone                     every expert is the MLP; of m segments (He et al., 2024) each has F/m of its hidden units, and routers start
                                      with equal rows for the segments of one expert, so that these are chosen together
    shared expert of S hidden units   it has the first S hidden units of the MLP, the experts the others
    shared expert of all F units      it is the MLP; experts start with copies of hidden units and W2 = 0, and so without effect
    residual MLP                      it is the MLP, and counts half
A gate of a shared expert starts at sigmoid(0) = 1/2, for which its W2 is doubled. LoREs start with B = 0 and so without effect. Where the weights
of a token's experts sum to one, or experts start without effect, the new model computes what the old one did.
Shapes: E experts; F hidden width of the MLP; D model width; f hidden width of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.config import config_from_dict
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.convert.architecture import Source
from megatron.convert.architectures.fit import router_kind
from megatron.convert.architectures.weights import FIRST_LAYER
from megatron.convert.errors import ConversionError
from megatron.model import build_model
from megatron.model.moe.layer import MoELayer

LINEAR = re.compile(r"sequential\.(\d+)\.mlp\.(linear[12]\.(?:weight|bias))")
CHOOSING_K = ("topk", "sigmoid", "quantile_balancing", "document_pool", "recurrent")
"""Routers that give every token its K best experts and may scale their weights."""
EXACT_ROUTERS = ("topk normalized", "top_p", *CHOOSING_K[1:])
BALANCE = ("load_balance", "global_load_balance", "sequence_load_balance")
BALANCED_ROUTERS = ("sigmoid", "sinkhorn", "expert_choice", "quantile_balancing", "expert_threshold")
"""Routers that keep the load even without a loss."""


@dataclass(frozen=True)
class Upcycled:
    """The sparse model: its keys and configuration; `is_exact`: it computes what the dense one did; sentences for the user."""

    keys: dict[str, Any]
    source: Source
    is_exact: bool
    notices: tuple[str, ...]

    def weights(self, dense: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The sparse model's weights from the dense one's, layer by layer. Raises ConversionError for biases that the experts do not have."""
        model, moe = self.source.config.model, self.source.config.moe
        gpt = build_model(model, moe, 1, seed=self.source.config.training.seed)
        sections = moe.for_layers(model.num_layers)
        fresh = {FIRST_LAYER + i: layer.mlp for i, layer in enumerate(gpt.layers) if isinstance(layer.mlp, MoELayer)}
        for name, tensor in dense:
            match = LINEAR.fullmatch(name)
            if match is None or int(match[1]) not in fresh:
                yield name, tensor
                continue
            number, part = int(match[1]), match[2]
            division = Division(model, sections[number - FIRST_LAYER])
            layer = f"sequential.{number}.mlp"
            if part == "linear1.weight":
                yield from ((f"{layer}.{new}", value) for new, value in fresh_weights(fresh[number], division, tensor))
            yield from ((f"{layer}.{new}", value) for new, value in parts_of(part, tensor, division, name))


class Division(NamedTuple):
    """How the hidden units of an MLP are divided among the parts of a layer with experts."""

    model: ModelConfig
    moe: MoEConfig

    @property
    def shared(self) -> int:
        """Hidden units of the shared expert; 0: there is none."""
        return self.moe.shared_width(self.model)

    @property
    def width(self) -> int:
        """f."""
        return self.moe.expert_width(self.model)

    @property
    def is_whole_shared(self) -> bool:
        """The shared expert is the whole MLP, so that the others start without effect."""
        return self.shared == self.model.mlp_width

    def units(self, expert: int) -> Tensor:
        """The hidden units that an expert starts with a copy of."""
        count = torch.arange(self.width)
        if self.is_whole_shared:
            return (count + expert * self.width) % self.model.mlp_width
        return self.shared + (expert % self.moe.moe_expert_segments) * self.width + count

    @property
    def experts_scale(self) -> float:
        """What the experts' W2 is multiplied by: segments of one expert share its weight out among them."""
        return 0.0 if self.is_whole_shared else float(self.moe.moe_expert_segments)

    @property
    def shared_scale(self) -> float:
        """What the shared expert's W2 is multiplied by."""
        return 2.0 if self.moe.moe_shared_expert_gate else 1.0

    @property
    def residual(self) -> str:
        """Where the residual MLP lies."""
        return f"beside.{int(self.shared > 0)}"


def upcycle(dense: Source, changes: Mapping[str, Any], keys: Mapping[str, Any]) -> Upcycled:
    """`changes`: the keys that ask for experts; `keys`: those of the dense model. Raises ConversionError where copies of the MLP cannot be experts,
    and ConfigError."""
    if foreign := sorted(key for key in changes if not key.startswith("moe_")):
        raise ConversionError(f"--upcycle: {foreign[0]} is not a key of experts (moe_...). Change other keys later, in the configuration of the run.")
    structmoe = changes.get("moe_expert_type") == "structmoe"
    biases = {"moe_expert_bias": True} if dense.config.model.use_bias_in_mlp else {}
    merged = {**keys, **biases, **changes, **({"moe_lore_init": "zero"} if structmoe else {})}
    config = config_from_dict(merged if changes else keys)
    moe = config.moe
    whole = moe.has_experts and Division(config.model, moe).is_whole_shared
    problems = [
        (dense.config.moe.has_experts, "the model has experts already"),
        (not moe.has_experts, "moe_num_experts must be 2 or more"),
        (
            moe.moe_expert_type not in ("grouped", "structmoe"),
            f"moe_expert_type {moe.moe_expert_type}: its matrices are products of low-rank matrices, and those of an MLP are not",
        ),
        (
            structmoe and moe.moe_lore_interaction == "gated",
            "moe_lore_interaction gated: LoREs start with B = 0, and the output would be multiplied by zero",
        ),
        (moe.moe_latent_size is not None, "moe_latent_size: experts are narrower than the hidden state, and an MLP is not"),
        (moe.num_zero_computation > 0, "moe_zero_experts, moe_copy_experts, moe_constant_experts: some tokens would not meet their MLP"),
        (moe.moe_router_type == "smoe_dropout" and not whole, "moe_router_type smoe_dropout: its experts have to differ, because it does not learn"),
        (
            moe.moe_router_type in ("expert_choice", "expert_threshold") and not whole,
            f"moe_router_type {moe.moe_router_type}: some tokens would have no expert",
        ),
    ]
    problem = next((sentence for wrong, sentence in problems if wrong), None) or _widths_problem(config.model, moe)
    if problem:
        raise ConversionError(f"--upcycle: {problem}.")
    exact = whole or (_sums_to_one(moe) and _segments_stay_together(moe))
    notices = ["The shared expert is the whole MLP. The other experts start without effect (W2 = 0) and learn in training."] if whole else []
    return Upcycled(merged, Source(config, dense.vocabulary), exact, (*notices, *_notices(moe, exact=exact)))


def _widths_problem(model: ModelConfig, moe: MoEConfig) -> str | None:
    """What to change where the hidden units of the MLP cannot be divided among the parts. None: they can."""
    division, width = Division(model, moe), model.mlp_width
    segments, shared = moe.moe_expert_segments, division.shared
    if division.is_whole_shared or shared + segments * division.width == width:
        return None
    if not shared:
        return f"an expert must be as wide as the MLP: set moe_ffn_hidden_size to {width}"
    if moe.moe_num_shared_experts:
        whole, rest = divmod(width * segments, moe.moe_num_shared_experts + segments)
        fits = (
            f"set moe_ffn_hidden_size to {whole}"
            if not rest
            else f"{width} cannot be divided into {moe.moe_num_shared_experts + segments} equal parts"
        )
    else:
        fits = f"set moe_ffn_hidden_size to {width - shared}" if shared < width else f"give it at most the {width} hidden units of the MLP"
    return (
        f"the shared expert has {shared} hidden units and an expert {segments * division.width}, but the MLP that they are made from has {width}: "
        f"{fits}, or moe_shared_expert_intermediate_size to {width}, with which the shared expert is the MLP and experts of any width start without "
        "effect"
    )


def _notices(moe: MoEConfig, *, exact: bool) -> Iterator[str]:
    if not exact:
        yield (
            "The weights of a token's experts do not sum to 1 (with moe_normalize_top_k: true they do). The logits therefore differ from the dense "
            "model's."
            if not _sums_to_one(moe)
            else f"moe_router_type {moe.moe_router_type} may choose only some of the segments of an expert. The logits therefore differ "
            "from the dense "
            "model's."
        )
    if not any(moe.moe_losses.get(name) for name in BALANCE) and moe.moe_router_type not in BALANCED_ROUTERS:
        yield (
            "moe_losses names no loss that balances the load, so a few experts may get all tokens. Add for example "
            "moe_losses: {load_balance: 0.01} to the configuration."
        )


def _sums_to_one(moe: MoEConfig) -> bool:
    kind, scaled = router_kind(moe), moe.moe_router_type in CHOOSING_K and moe.moe_router_topk_scaling_factor != 1.0
    return not scaled and kind in EXACT_ROUTERS and (kind == "topk normalized" or moe.moe_normalize_top_k)


def _segments_stay_together(moe: MoEConfig) -> bool:
    """Whether the segments of one expert, whose routers are equal, are always chosen together."""
    groups = moe.moe_router_num_groups if moe.moe_router_type == "sigmoid" else None
    whole_groups = all(count // moe.moe_expert_segments % (groups or 1) == 0 for count in moe.expert_counts)
    return moe.moe_expert_segments == 1 or (moe.moe_router_type in CHOOSING_K and whole_groups)


# ---------------------------------------------------------------- weights


def parts_of(part: str, tensor: Tensor, division: Division, name: str) -> Iterator[tuple[str, Tensor]]:
    """(name in the layer, weight) of everything that starts from one of the MLP's weights. Raises ConversionError for biases that have no place."""
    if division.moe.moe_use_residual:
        yield f"{division.residual}.mlp.{part}", tensor
    yield from _shared(part, tensor, division)
    if part.endswith("bias") and not division.moe.moe_expert_bias:
        needed = tensor if part == "linear1.bias" and not division.is_whole_shared else tensor[:0]
        if part == "linear2.bias" and not division.shared:
            needed = tensor
        if bool(needed.any()):
            raise ConversionError(f"{name} is not zero, but these experts have no biases: set moe_expert_bias to true.")
        return
    yield from _experts(part, tensor, division)


def _shared(part: str, tensor: Tensor, division: Division) -> Iterator[tuple[str, Tensor]]:
    """The shared expert: the first hidden units, and the bias of the output."""
    if division.shared:
        if part.startswith("linear1"):
            tensor = torch.cat([matrix[: division.shared] for matrix in tensor.chunk(2 if division.model.is_gated else 1)])
        elif part == "linear2.weight":
            tensor = division.shared_scale * tensor[:, : division.shared]
        else:
            tensor = division.shared_scale * tensor
        yield f"beside.0.mlp.{part}", tensor


def _experts(part: str, tensor: Tensor, division: Division) -> Iterator[tuple[str, Tensor]]:
    """w1 (up), w3 (gate) and w2 of every expert, and their biases."""
    experts, units = division.moe.num_experts, [division.units(expert) for expert in range(division.moe.num_experts)]
    if part == "linear2.bias":
        yield "experts.mlp.b2.bias", (torch.zeros_like(tensor) if division.shared else tensor).repeat(experts, 1)
    elif part == "linear2.weight":
        w2_FD = division.experts_scale * tensor.t()
        yield "experts.mlp.w2", torch.cat([w2_FD[rows] for rows in units])
    else:
        for number, matrix in zip("13", tensor.chunk(2) if division.model.is_gated else (tensor,), strict=False):
            rows_of_experts = [matrix[rows] for rows in units]
            if part == "linear1.bias":
                yield f"experts.mlp.b{number}.bias", torch.stack(rows_of_experts)
            else:
                yield f"experts.mlp.w{number}", torch.cat(rows_of_experts)


def fresh_weights(mlp: nn.Module, division: Division, like: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the dense model has nothing like: routers and LoREs, as a new model starts, with B = 0; gates and mixtures of what stands beside at 0."""
    segments = 1 if division.is_whole_shared else division.moe.moe_expert_segments
    for name, tensor in mlp.state_dict().items():
        if name.startswith("experts.mlp.") or ".mlp.linear" in name:
            continue
        if name.startswith("beside."):  # the gate of a shared expert, the mixture of a residual MLP
            tensor = torch.zeros_like(tensor)
        elif name == "router.layer.weight":
            tensor = tensor[::segments].repeat_interleave(segments, dim=0)
        yield name, tensor if ".balance." in name else tensor.to(like.dtype)
