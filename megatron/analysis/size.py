"""The sizes of models, computed from their configurations, and the settings that make one model as large as another. Nothing is built or
allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.analysis.vocabulary import stated_vocabulary, vocabulary
from megatron.config.loader import LoadedConfig, load_config
from megatron.config.moe import MoEConfig
from megatron.config.neox import NeoXConfig
from megatron.config.parallel import layout_problem
from megatron.config.section import ConfigError
from megatron.config.size import Memory, ParameterCount, count_parameters, divided_memory, flops_per_token, padded_vocab_size, training_memory

_MOST = 4096  # experts or LoREs that a match may ask for


@dataclass(frozen=True)
class Layout:
    """The assumptions for the sizes. vocabulary: its number of tokens; None: each configuration's own. zero_stage None: each configuration's own."""

    vocabulary: int | None = None
    processes: int = 1
    zero_stage: int | None = None


@dataclass(frozen=True)
class ModelSize:
    """A configuration and the size of its model. flops: of one token in training, without recomputation. memory: of one process."""

    name: str
    config: NeoXConfig
    padded_vocabulary: int
    count: ParameterCount
    flops: int
    memory: Memory


@dataclass(frozen=True)
class Match:
    """The value of one key that makes a model's size nearest to another's.

    reached: the model's size with this value. difference: reached minus the other's size. without_routers: the same difference without both routers.
    """

    key: str
    value: int
    reached: int
    difference: int
    without_routers: int


def read_sizes(paths: list[str], layout: Layout) -> list[ModelSize]:
    """The sizes of the models in these files, one file a model. Raises ConfigError with what is wrong in any of them."""
    sizes, problems = [], []
    for path in paths:
        try:
            sizes.append(size_of(path, load_config([path]), layout))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # a file may be given twice
    return sizes


def size_of(name: str, loaded: LoadedConfig, layout: Layout) -> ModelSize:
    """The size of one model. Raises ConfigError if the size of its vocabulary is not known."""
    config = loaded.config
    padded = padded_vocab_size(layout.vocabulary or _vocabulary(name, loaded), config.model.make_vocab_size_divisible_by)
    count = count_parameters(config.model, config.moe, padded)
    return ModelSize(
        name=name,
        config=config,
        padded_vocabulary=padded,
        count=count,
        flops=flops_per_token(config.model, config.moe, padded),
        memory=memory_in_layout(config, count, layout.processes, layout.zero_stage),
    )


def memory_per_process(config: NeoXConfig, parameters: int, processes: int, zero_stage: int | None = None) -> Memory:
    """Weights, gradients and optimizer of a model of `parameters` as this configuration trains it; `zero_stage` None: the configuration's."""
    stage = config.optimizer.zero_optimization.stage if zero_stage is None else zero_stage
    return training_memory(
        parameters,
        config.precision,
        zero_stage=stage,
        data_parallel_size=processes,
        averages=config.optimizer.averages,
        sums_in_fp32=config.sums_in_fp32 if config.optimizer.data_types else None,
    )


def memory_in_layout(config: NeoXConfig, count: ParameterCount, processes: int, zero_stage: int | None = None) -> Memory:
    """The same for one of `processes` that divide the model as the configuration says. Where they cannot, as if one process had all of it."""
    layout = config.parallel.layout
    if layout_problem(layout, processes) is not None:
        return memory_per_process(config, count.total_sum, processes, zero_stage)
    replicas = processes // layout.model
    return divided_memory(count, layout, replicas, lambda parameters, copies: memory_per_process(config, parameters, copies, zero_stage))


def matches(model: ModelSize, other: ModelSize, *, active: bool = False) -> list[Match]:
    """For each key that changes the model's total (or active) parameters: the value that makes them nearest to the other's.

    A key is left out if its allowed values give only smaller or only larger sizes than the other's. Raises ConfigError if the model has no experts.
    """
    if not model.config.moe.has_experts:
        raise ConfigError([f"{model.name}: has no experts, so it has no key (number of experts or LoREs, rank) that could match it to {other.name}"])
    target, target_routers = _size(other, active), _routers(other, active)
    found = []
    for key, least, most in _keys(model.config, active):
        value = _nearest(model, key, range(least, most + 1), target, active)
        if value is None:
            continue
        changed = _with(model, key, value)
        reached = _size(changed, active)
        without = (reached - _routers(changed, active)) - (target - target_routers)
        found.append(Match(key, value, reached, reached - target, without))
    return found


def _vocabulary(name: str, loaded: LoadedConfig) -> int:
    words = vocabulary(loaded.config.data)
    stated = next((number for number in map(stated_vocabulary, loaded.files.values()) if number), None)
    if words.size is None and stated is None:
        raise ConfigError([f"{name}: its vocabulary is not known ({words.reason}); give the number of tokens with --vocab"])
    return words.size or stated or 0


def _keys(config: NeoXConfig, active: bool) -> Iterator[tuple[str, int, int]]:
    """(key, least, most) of what may be changed."""
    model, moe = config.model, config.moe
    if moe.moe_expert_type == "structmoe":
        seen = moe.expert_model(model).hidden_size
        largest = max(seen, seen if moe.moe_lore_interaction == "standalone" else moe.expert_width(model))
        yield "moe_lore_rank", 1, largest if moe.moe_lore_routed else largest // moe.moe_num_lores
        if not (active and moe.moe_lore_routed):
            yield "moe_num_lores", moe.moe_lore_top_k, _MOST if moe.moe_lore_routed else largest // moe.moe_lore_rank
        if active and moe.moe_lore_routed:
            yield "moe_lore_top_k", 1, moe.moe_num_lores
    if moe.moe_expert_type == "decomposed":
        yield "moe_decomposition_rank", 1, max(moe.expert_model(model).hidden_size, moe.expert_width(model))
    if moe.moe_latent_size is not None:
        yield "moe_latent_size", 1, model.hidden_size
    if not active and moe.moe_num_experts_by_layer is None:
        yield "moe_num_experts", max(2, moe.moe_top_k), _MOST
    elif active and moe.moe_router_type != "top_p":
        yield "moe_top_k", 1, min(moe.moe_num_experts_by_layer or [moe.moe_num_experts])


def _nearest(model: ModelSize, key: str, values: range, target: int, active: bool) -> int | None:
    """The allowed value whose size, which grows with it, is nearest to the target; None where the target is outside what the values reach."""
    low, high = values[0], values[-1]
    if not _size(_with(model, key, low), active) <= target <= _size(_with(model, key, high), active):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _size(_with(model, key, middle), active) <= target else (low, middle)
    sides = range(low, values[0] - 1, -1), range(high, values[-1] + 1)
    nearest = (next((value for value in side if _is_allowed(model, key, value)), None) for side in sides)
    found = [value for value in nearest if value is not None]
    return min(found, key=lambda value: abs(_size(_with(model, key, value), active) - target), default=None)


def _is_allowed(model: ModelSize, key: str, value: int) -> bool:
    """Whether a configuration may have this value: groups of experts, for one, must divide their number."""
    moe = model.config.moe.model_copy(update={key: value})
    return not [*moe.check(), *moe.check_with(model.config.model)]


def _with(model: ModelSize, key: str, value: int) -> ModelSize:
    moe = model.config.moe.model_copy(update={key: value})
    return replace(
        model,
        config=model.config.model_copy(update={"moe": moe}),
        count=count_parameters(model.config.model, moe, model.padded_vocabulary),
    )


def _size(model: ModelSize, active: bool) -> int:
    return model.count.active_sum if active else model.count.total_sum


def _routers(model: ModelSize, active: bool) -> int:
    """Routers of experts and of LoREs: what is left of both parts with LoREs of rank 0."""
    moe: MoEConfig = model.config.moe.model_copy(update={"moe_lore_rank": 0})
    count = count_parameters(model.config.model, moe, 0)
    parts = count.active if active else count.total
    return parts["routers"] + parts["lores"]
