"""Gives each process its part of a model that was built whole, layer by layer: which weights it keeps (`division.Cut`), and what its modules know.

Column-parallel weights are cut along dimension 0, row-parallel ones along dimension 1 (Shoeybi et al., 2019, section 3), and where several matrices
are packed into one, each of them. Experts are divided by number: among the expert-parallel processes, and of those among the tensor-parallel ones, as
GPT-NeoX does; so LoREs, their routers and the factors of decomposed experts lie whole beside their expert. Plain experts may be divided by width
instead. Everything else is on every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor, nn

from megatron.kernels.attention import HeadLayout
from megatron.model.attention import SelfAttention
from megatron.model.division import Cut, Span, whole_cut
from megatron.model.embedding import Embedding, FinalLinear, Head, VocabShare
from megatron.model.layer import TransformerLayer
from megatron.model.mlp import MLP
from megatron.model.moe.dispatch.all_to_all import AllToAllDispatcher
from megatron.model.moe.dispatch.transport import ExpertShare
from megatron.model.moe.experts.grouped import ExpertMLP
from megatron.model.moe.layer import MoELayer
from megatron.model.moe.shared import ResidualMLP, SharedExpert
from megatron.mpu.cross_entropy import own_rows
from megatron.mpu.gradients import SharedRows
from megatron.mpu.groups import ALONE, Group, Groups
from megatron.mpu.random import SharedDropout
from megatron.mpu.regions import InnerRegion, Region

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig
    from megatron.config.moe import MoEConfig


class Part(NamedTuple):
    """What a process does with one weight."""

    cut: Cut
    summed: bool = False
    """Whether its gradient is a part of a sum over the tensor-parallel processes, though all of them hold the weight."""


class Divider:
    """Divides the parts of one model and keeps `cuts`, the table of what this process holds. `sequence`: sequence parallelism. `by_width`: experts
    are divided by their hidden width among tensor-parallel processes, and not by their number.
    """

    def __init__(self, groups: Groups, *, sequence: bool = False, by_width: bool = False) -> None:
        self.groups, self.by_width = groups, by_width and groups.tensor.size > 1
        self.region = Region(groups.tensor, sequence and groups.tensor.size > 1)
        self.cuts: dict[str, Cut] = {}
        self._divided: dict[int, Cut] = {}

    def part(self, part: nn.Module, name: str, model: ModelConfig, moe: MoEConfig | None) -> None:
        """Any part of the model; `moe` is the section of a layer with experts."""
        if isinstance(part, TransformerLayer):
            self._layer(part, name, model, moe)
        elif isinstance(part, Embedding):
            self._embedding(part, name)
        elif isinstance(part, FinalLinear):
            self._head(part, name)
        else:
            self._keep(part, name, {})

    def _layer(self, layer: TransformerLayer, name: str, model: ModelConfig, moe: MoEConfig | None) -> None:
        """A transformer layer; `moe` is its own section."""
        parts = self._attention(layer.attention, model)
        if isinstance(layer.mlp, MoELayer):
            assert moe is not None
            parts |= self._experts(layer.mlp, moe)
        elif isinstance(layer.mlp, MLP):
            parts |= self._mlp(layer.mlp, self.region)
        self._outside(layer)
        self._keep(layer, name, parts)

    def _embedding(self, embedding: Embedding, name: str) -> None:
        """Rows of the vocabulary; positions are on every process."""
        table = embedding.word_embeddings
        embedding.share, cut = self._vocabulary(table.weight)
        table.num_embeddings = len(embedding.share.rows)
        self._outside(embedding)
        self._keep(embedding, name, {cast(nn.Parameter, table.weight): Part(cut)})

    def _head(self, module: nn.Module, name: str) -> None:
        """Rows of an output projection with a weight of its own."""
        head = next(part for part in module.modules() if isinstance(part, Head))
        head.share, cut = self._vocabulary(head.weight)
        self._keep(module, name, {head.weight: Part(cut)})

    def _outside(self, module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, SharedDropout):
                part.region = self.region

    def _keep(self, module: nn.Module, name: str, parts: Mapping[nn.Parameter, Part]) -> None:
        """Cuts the weights, and marks them for DeepSpeed and for the sums of gradients (`mpu/gradients.py`)."""
        tensor, expert = self.groups.tensor, self.groups.expert
        for own_name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) not in self._divided:
                outside = Part(self._everywhere(parameter), summed=self.region.sequence)
                cut, summed = parts.get(parameter, outside)
                parameter.data = cut.take(parameter.data).clone() if not cut.is_whole else parameter.data
                self._divided[id(parameter)] = cut
                mark(parameter, summed=tensor if summed and tensor.size > 1 else None, divided=tensor.size > 1 and not cut.is_whole)
                if expert.size > 1 and ".experts." in own_name:
                    mark_expert(parameter, expert)
            self.cuts[f"{name}.{own_name}"] = self._divided[id(parameter)]
        for own_name, buffer in module.named_buffers():
            self.cuts[f"{name}.{own_name}"] = self._everywhere(buffer)

    def _vocabulary(self, weight: Tensor) -> tuple[VocabShare, Cut]:
        group, vocabulary = self.groups.tensor, weight.shape[0]
        rows = own_rows(vocabulary, group.size, group.rank)
        return VocabShare(self.region, rows, vocabulary), _along(weight, 0, [Span(rows.start, rows.stop)])

    def _attention(self, attention: SelfAttention, model: ModelConfig) -> dict[nn.Parameter, Part]:
        group, whole, d = self.groups.tensor, attention.layout, attention.layout.head_dim
        if group.size == 1:
            return {}
        heads, kv_heads = whole.heads // group.size, max(1, whole.kv_heads // group.size)
        queries = range(group.rank * heads, (group.rank + 1) * heads)
        first_kv = group.rank * whole.kv_heads // group.size
        owns_kv = whole.kv_heads >= group.size or group.rank % (group.size // whole.kv_heads) == 0
        if whole.heads == whole.kv_heads:
            spans = [Span(3 * d * queries.start, 3 * d * queries.stop)]
        else:
            starts = (d * (whole.heads + first_kv), d * (whole.heads + whole.kv_heads + first_kv))
            spans = [Span(d * queries.start, d * queries.stop), *(Span(start, start + d * kv_heads, owns_kv) for start in starts)]
        attention.share(model, self.region, HeadLayout(heads, kv_heads, d), queries)
        parts = {parameter: Part(_along(parameter, 0, spans)) for parameter in attention.query_key_value.parameters()}
        if whole.kv_heads < group.size:
            for parameter in attention.query_key_value.parameters():
                parameter.shared_rows = SharedRows(d * heads, d * first_kv, d * whole.kv_heads, owns_kv)  # type: ignore[attr-defined]
        parts[cast(nn.Parameter, attention.dense.weight)] = Part(_along(attention.dense.weight, 1, [Span(d * queries.start, d * queries.stop)]))
        if attention.rpe is not None:
            parts[attention.rpe.weight] = Part(_along(attention.rpe.weight, 1, [Span(queries.start, queries.stop)]))
        for norm in (attention.qk_layernorm, attention.q_norm, attention.k_norm):
            parts |= {parameter: Part(self._everywhere(parameter), summed=True) for parameter in (norm.parameters() if norm is not None else ())}
        return parts

    def _mlp(self, mlp: MLP, region: Region) -> dict[nn.Parameter, Part]:
        group, width = self.groups.tensor, mlp.linear2.weight.shape[1]
        if group.size == 1:
            return {}
        mlp.region = region
        start, stop = group.rank * width // group.size, (group.rank + 1) * width // group.size
        spans = [Span(start + part * width, stop + part * width) for part in range(mlp.parts)]
        parts = {parameter: Part(_along(parameter, 0, spans)) for parameter in mlp.linear1.parameters()}
        parts[cast(nn.Parameter, mlp.linear2.weight)] = Part(_along(mlp.linear2.weight, 1, [Span(start, stop)]))
        if mlp.linear2.bias is not None and isinstance(region, InnerRegion):
            parts[mlp.linear2.bias] = Part(self._everywhere(mlp.linear2.bias), summed=True)
        return parts

    def _experts(self, layer: MoELayer, moe: MoEConfig) -> dict[nn.Parameter, Part]:
        share = ExpertShare(moe.num_experts, self.groups.expert, ALONE if self.by_width else self.groups.tensor)
        if share.here == share.num_experts and not self.by_width:
            return {}
        layer.region = self.region
        if share.here < share.num_experts:
            layer.dispatcher, layer.sends = AllToAllDispatcher(moe, share), share.expert.size > 1
        parts: dict[nn.Parameter, Part] = {}
        for parameter in layer.experts.parameters():
            rows = parameter.shape[0] // share.num_experts
            parts[parameter] = Part(_along(parameter, 0, self._expert_spans(share, rows)))
        for module in layer.experts.modules():
            if hasattr(module, "num_experts"):
                module.num_experts = share.here
            if self.by_width and isinstance(module, ExpertMLP):
                module.width //= self.groups.tensor.size
        if self.groups.tensor.size > 1:
            parts |= {parameter: Part(self._everywhere(parameter)) for parameter in layer.router.parameters()}
            for around in (layer.latent, layer.zero_computation):  # each process has a part of what goes through them
                parts |= {parameter: Part(self._everywhere(parameter), summed=True) for parameter in around.parameters()}
            for beside in layer.beside:
                parts |= self._beside(beside)
        return parts

    def _expert_spans(self, share: ExpertShare, rows: int) -> list[Span]:
        """The rows of this process in a weight that has `rows` for each expert."""
        if not self.by_width:
            return [Span(share.first * rows, (share.first + share.here) * rows)]
        own = rows // self.groups.tensor.size
        starts = (expert * rows + self.groups.tensor.rank * own for expert in range(share.first, share.first + share.here))
        return [Span(start, start + own) for start in starts]

    def _beside(self, beside: nn.Module) -> dict[nn.Parameter, Part]:
        """A shared expert or a residual MLP: its MLP is divided, and what weighs it sees a part of its output."""
        assert isinstance(beside, SharedExpert | ResidualMLP)
        parts = {parameter: Part(self._everywhere(parameter), summed=True) for parameter in beside.parameters()}
        return parts | self._mlp(beside.mlp, InnerRegion(self.groups.tensor))

    def _everywhere(self, parameter: Tensor) -> Cut:
        return whole_cut(parameter.shape, owned=self.groups.tensor.rank == 0)


def mark(parameter: nn.Parameter, *, summed: Group | None, divided: bool) -> None:
    """`summed`: the processes whose gradients make up the whole gradient. `divided`: other tensor-parallel processes have other parts of it."""
    parameter.summed_over = summed  # type: ignore[attr-defined]
    parameter.model_parallel = divided  # type: ignore[attr-defined]  # DeepSpeed's name: its norms count such a weight on every process


def mark_expert(parameter: nn.Parameter, expert: Group) -> None:
    """DeepSpeed's marks of a weight that other data-parallel processes do not have."""
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = expert_group_name(expert)  # type: ignore[attr-defined]


def expert_group_name(expert: Group) -> str:
    """DeepSpeed's name of the group."""
    return f"ep_size_{expert.size}"


def _along(parameter: Tensor, dim: int, spans: list[Span]) -> Cut:
    """The spans along one dimension, all of the others."""
    every = whole_cut(parameter.shape).spans
    return Cut(tuple(parameter.shape), tuple(tuple(spans) if place == dim else every[place] for place in range(parameter.ndim)))
