"""What moves in a layer: which parameters divide by expert or by LoRE, and modules built for another number of experts.

Shapes: E experts; M LoREs per expert.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.checkpoint.expert_places import Wanted
from megatron.config.components import EXPERTS, resolve_component
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.config.neox import NeoXConfig
from megatron.inference.offload.files import private_memory
from megatron.model.gpt import FIRST_LAYER, GPT
from megatron.model.initialization import Initializer
from megatron.model.moe.layer import MoELayer

LORE_PARTS = ("lores.a", "lores.b", "gate_lores.a", "gate_lores.b")
"""The parameters of StructMoE that divide by LoRE: the factors. The second routers stay."""


class LayerUnits(NamedTuple):
    """What moves in one layer."""

    layer: int
    names: tuple[str, ...]
    """Parameters of the experts module that move."""
    units: int
    """Experts, or LoREs of all experts."""
    shapes: tuple[tuple[int, ...], ...]
    """Of one unit's part of each parameter."""

    @property
    def prefix(self) -> str:
        """Of the parameters' names in a checkpoint."""
        return f"sequential.{FIRST_LAYER + self.layer}.mlp.experts."

    @property
    def wanted(self) -> Wanted:
        """As the files are asked for it."""
        return Wanted(self.prefix, self.names, self.units)


def _leave(matrix: Tensor) -> None:
    """Fills nothing: the memory of a matrix that is loaded later is not touched before."""


EMPTY = Initializer(_leave, _leave, _leave, lambda std: _leave)
"""For models whose weights are loaded."""


def layer_units(layer: int, experts: Any, *, granularity: str) -> LayerUnits:
    """What moves in a layer whose experts module is `experts`."""
    lores = granularity == "lore"
    units = experts.num_lores if lores else experts.num_experts
    parts = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters() if not lores or name in LORE_PARTS}
    return LayerUnits(layer, tuple(parts), units, tuple((rows // units, *rest) for rows, *rest in parts.values()))


def units_of(config: NeoXConfig, vocabulary: int, *, granularity: str) -> dict[int, LayerUnits]:
    """What moves in every layer of a configured model, by layer. Nothing of the model stays in memory."""
    return units_in(GPT(config.model, config.moe, vocabulary, EMPTY), granularity=granularity)


def units_in(gpt: GPT, *, granularity: str) -> dict[int, LayerUnits]:
    """What moves in every layer of a model, by layer."""
    return {number: layer_units(number, part.experts, granularity=granularity) for number, part in moe_layers(gpt).items()}


def moe_layers(gpt: GPT) -> dict[int, MoELayer]:
    """The layers with experts by number."""
    pairs = zip(gpt.layer_numbers, gpt.layers, strict=True)
    return {number: layer.mlp for number, layer in pairs if isinstance(layer.mlp, MoELayer)}


def fingerprint(read: Callable[[str], Tensor], units: Mapping[int, LayerUnits]) -> int:
    """CRC-32 of the routers' weights, rounded to bfloat16: it tells whether a file of experts belongs to a checkpoint. `read`: a weight by name."""
    total = 0
    for number in sorted(units):
        weight = read(f"sequential.{FIRST_LAYER + number}.mlp.router.layer.weight").detach().to(torch.bfloat16).contiguous()
        numbers: Any = weight.view(torch.uint8).numpy()
        total = zlib.crc32(numbers.tobytes(), total)
    return total


def build_for(model: ModelConfig, moe: MoEConfig, count: int, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The layer's experts module for `count` experts in place of its own number, its memory not touched. `moe`: the layer's own section."""
    sizes = {"moe_num_experts": count, "moe_num_experts_by_layer": None, "moe_expert_segments": 1, "moe_ffn_hidden_size": moe.expert_width(model)}
    with torch.device("meta"):
        experts: nn.Module = resolve_component(EXPERTS, moe.moe_expert_type)(moe.expert_model(model), moe.model_copy(update=sizes), EMPTY)
    experts = experts.to(dtype).to_empty(device=device)
    return experts.eval().requires_grad_(False)


def align(experts: nn.Module) -> None:
    """Puts every parameter of a module on a CPU at the beginning of a page, where files can be read to directly."""
    for parameter in experts.parameters():
        pages = private_memory(max(1, parameter.nbytes))
        parameter.data = torch.frombuffer(pages, dtype=parameter.dtype, count=parameter.numel()).view(parameter.shape)
