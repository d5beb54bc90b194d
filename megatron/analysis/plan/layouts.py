"""All layouts of a run that the configuration allows on so many GPUs, estimated from short traces, best first.

A layer costs the same wherever it stands. So one period of layers and two periods are traced, and the difference counts for every further period.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron.analysis.plan.estimate import Cluster, Estimate, Stage, add_sends, in_flight, memory_of, put_together, ranks_of, sums_of
from megatron.analysis.plan.machine import PlanError
from megatron.analysis.plan.memory import held
from megatron.analysis.plan.rank import Step, build_part, fake_process, own_groups, prepare, trace_step
from megatron.analysis.plan.trace import Trace
from megatron.config import config_from_dict
from megatron.config.neox import NeoXConfig, data_parallel_size
from megatron.config.parallel import Layout
from megatron.config.section import ConfigError
from megatron.config.training import resolve_batch
from megatron.model.gpt import GPT
from megatron.mpu.groups import Groups
from megatron.mpu.topology import Topology

SIZES = (1, 2, 4, 8, 16, 32, 64)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
RECOMPUTE: Mapping[str, dict[str, Any]] = {
    "none": {"checkpoint_activations": False, "recompute_modules": []},
    "layers": {"checkpoint_activations": True, "recompute_modules": []},
}
SEARCHED = ("model_parallel_size", "pipe_parallel_size", "moe_expert_parallel_size", "zero_optimization", "train_micro_batch_size_per_gpu")


class Choice(NamedTuple):
    """What the search varies."""

    layout: Layout
    zero: int
    micro: int
    recompute: str

    def keys(self) -> dict[str, Any]:
        """As keys of a configuration."""
        shares = {"sequence_parallel": True} if self.layout.tensor > 1 else {"sequence_parallel": False}
        return {
            "model_parallel_size": self.layout.tensor,
            "pipe_parallel_size": self.layout.pipe if self.layout.pipe > 1 else 0,
            "moe_expert_parallel_size": self.layout.expert,
            "train_micro_batch_size_per_gpu": self.micro,
            **shares,
            **RECOMPUTE[self.recompute],
        }


@dataclass(frozen=True)
class Found:
    """A layout that works, and its estimate from short traces."""

    choice: Choice
    estimate: Estimate


class Search:
    """The search. given: the keys of the configuration. sequences: of a step, the same in every layout."""

    def __init__(self, config: NeoXConfig, vocabulary: int, cluster: Cluster, sequences: int) -> None:
        self.config, self.vocabulary, self.cluster, self.sequences = config, vocabulary, cluster, sequences
        self._traces: dict[tuple[Any, ...], tuple[Trace, Trace]] = {}
        self._parts: dict[tuple[Layout, int], tuple[GPT, Groups]] = {}

    def layouts(self) -> list[Layout]:
        """Those that the numbers of GPUs, heads, layers and experts allow, whatever the rest. Raises PlanError if layers differ without a period."""
        moe = self.config.moe
        if named := next((key for key in ("moe_num_experts_by_layer", "moe_layers") if getattr(moe, key) is not None), None):
            raise PlanError(f"{named} makes layers differ, and the search needs layers that repeat; use --layouts 0 to plan the given layout alone")
        choices = (Layout(t, p, e) for t in SIZES for p in SIZES for e in sorted({*SIZES, *self._divisors()}))
        return [layout for layout in choices if self._config(Choice(layout, 0, 1, "none")) is not None]

    def run(self, layouts: Sequence[Layout], done: Callable[[], None]) -> list[Found]:
        """Layouts that fit the memory, fastest first. `done` is called after each of `layouts`."""
        found = []
        for layout in layouts:
            found += list(self._of(layout))
            done()
        return sorted(found, key=lambda each: -each.estimate.tokens_per_gpu)

    def _of(self, layout: Layout) -> Iterator[Found]:
        """A larger micro-batch is tried if the smaller one fitted."""
        room = self.cluster.machine.memory_gib * 2**30
        for recompute in RECOMPUTE:
            for micro in MICRO_BATCHES:
                fits = False
                for zero in range(4):
                    estimated = self._estimate(Choice(layout, zero, micro, recompute))
                    if estimated is not None and estimated.memory.total <= room:
                        fits = True
                        yield Found(Choice(layout, zero, micro, recompute), estimated)
                if not fits:
                    break

    def _estimate(self, choice: Choice) -> Estimate | None:
        config = self._config(choice)
        if config is None:
            return None
        batch = resolve_batch(config.training, data_parallel_size(config, self.cluster.gpus))
        short, longer = self._short(config, choice)
        stages: list[Stage] = []
        for number in range(choice.layout.pipe):
            alike = self._alike(config, choice.layout, number)
            stages.append(stages[alike] if alike < number else self._stage(config, choice, number, (short, longer)))
        return put_together(config, self.vocabulary, self.cluster, tuple(stages), batch)

    def _config(self, choice: Choice) -> NeoXConfig | None:
        """None: the configuration cannot be divided so."""
        given = {key: value for key, value in self.config.given().items() if key not in ("gradient_accumulation_steps", *SEARCHED)}
        zero = self.config.optimizer.zero_optimization.model_dump(mode="json", exclude_unset=True) | {"stage": choice.zero}
        try:
            config = config_from_dict({**given, **choice.keys(), "zero_optimization": zero, "train_batch_size": self.sequences})
            resolve_batch(config.training, data_parallel_size(config, self.cluster.gpus))
        except ConfigError:
            return None
        return config

    def _stage(self, config: NeoXConfig, choice: Choice, stage: int, traces: tuple[Trace, Trace]) -> Stage:
        part, groups, topology = self._part(config, choice.layout, stage)
        parts = held(part, config, groups)
        batch = resolve_batch(config.training, topology.data_parallel_size)
        trace = lengthened(*traces, periods=len(part.layer_numbers) / period(config), head=part.is_last)
        add_sends(trace, config, batch.micro, stage)
        memory = memory_of(config, parts, trace, in_flight(topology, batch))
        sums = sums_of(config, parts, groups, batch.accumulation)
        return Stage(topology.rank, sum(each.own for each in parts), tuple(parts), trace, memory, sums, ranks_of(groups))

    def _alike(self, config: NeoXConfig, layout: Layout, stage: int) -> int:
        """The first stage that costs the same: of those between the first and the last one, one with as many layers."""
        if stage in (0, 1, layout.pipe - 1):
            return stage
        spans = getattr(self._part(config, layout, 0)[0], "spans", [])
        return next(earlier for earlier in range(1, stage + 1) if len(spans[earlier]) == len(spans[stage]))

    def _part(self, config: NeoXConfig, layout: Layout, stage: int) -> tuple[GPT, Groups, Topology]:
        rank = stage * (self.cluster.gpus // layout.pipe)
        topology = Topology(self.cluster.gpus, rank, rank, layout)
        if (layout, stage) not in self._parts:
            groups = own_groups(topology)
            self._parts[layout, stage] = build_part(config, self.vocabulary, groups), groups
        return *self._parts[layout, stage], topology

    def _short(self, config: NeoXConfig, choice: Choice) -> tuple[Trace, Trace]:
        """Traces of a model with one period of layers, and with two, without a pipeline."""
        key = choice.layout.tensor, choice.layout.expert, choice.micro, choice.recompute
        if key not in self._traces:
            layout = choice.layout._replace(pipe=1)
            gpus = layout.tensor * layout.expert
            first, second = (self._traced(config, layout, choice, count * period(config), gpus) for count in (1, 2))
            self._traces[key] = first, second
        return self._traces[key]

    def _traced(self, config: NeoXConfig, layout: Layout, choice: Choice, layers: int, gpus: int) -> Trace:
        first = config.moe.moe_first_k_dense_layers
        model = config.model.model_copy(update={"num_layers": layers})
        moe = config.moe.model_copy(update={"moe_first_k_dense_layers": 0} if first else {})
        parallel = config.parallel.model_copy(update={"pipe_parallel_size": 0})
        short = config.model_copy(update={"model": model, "moe": moe, "parallel": parallel})
        with fake_process(Topology(gpus, 0, 0, layout)) as groups:
            part = build_part(short, self.vocabulary, groups)
            step = Step(choice.micro, self.cluster.skew)
            prepare(short, part, groups, step)
            return trace_step(short, part, groups, step)

    def _divisors(self) -> set[int]:
        most = max((section.num_experts for section in self.config.moe.for_layers(self.config.model.num_layers).values()), default=1)
        return {size for size in range(1, most + 1) if most % size == 0 and self.cluster.gpus % size == 0}


def period(config: NeoXConfig) -> int:
    """After so many layers the kinds of layers repeat, or the first dense ones are over."""
    return min(config.moe.moe_expert_interval, config.model.num_layers) if config.moe.has_experts else 1


def lengthened(short: Trace, longer: Trace, *, periods: float, head: bool) -> Trace:
    """A stage of so many periods of layers, with the rest of the model (`head`) or without."""
    found = replace(short, work=Counter(), messages=Counter())
    for name in ("work", "messages"):
        one, two, counts = getattr(short, name), getattr(longer, name), getattr(found, name)
        for key in {*one, *two}:
            layers = two[key] - one[key]
            counts[key] = max(0.0, layers * periods + (one[key] - layers if head else 0))
    layer, working = longer.kept - short.kept, longer.peak - longer.kept
    found.kept = int(layer * periods + (short.kept - layer if head else 0))
    found.peak = found.kept + working
    return found
