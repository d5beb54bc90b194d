"""One layout, estimated: each stage's process is built and traced, then its memory and the time of a step are put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron.analysis.plan.efficiency import Efficiency
from megatron.analysis.plan.machine import Machine, PlanError
from megatron.analysis.plan.memory import Held, RankMemory, buffer_bytes, gradient_bytes, gradient_size, held, optimizer_bytes, weight_bytes
from megatron.analysis.plan.rank import Step, build_part, fake_process, prepare, trace_step
from megatron.analysis.plan.timing import Seconds, Sums, micro_batch_seconds, step_seconds, sums_seconds, update_seconds
from megatron.analysis.plan.trace import Message, Trace
from megatron.config.neox import NeoXConfig, data_parallel_size
from megatron.config.size import flops_per_token
from megatron.config.training import Batch, resolve_batch
from megatron.mpu.groups import Groups
from megatron.mpu.topology import Topology


@dataclass(frozen=True)
class Cluster:
    """What is given: the machine, how many GPUs, how even the routing is (rows of the fullest process over the mean), the software."""

    machine: Machine
    gpus: int
    skew: float
    stack: Efficiency


@dataclass(frozen=True)
class Stage:
    """The process of one pipeline stage. parameters: that it holds. sums: what it exchanges of weights and gradients in a step."""

    rank: int
    parameters: int
    parts: tuple[Held, ...]
    trace: Trace
    memory: RankMemory
    sums: tuple[Sums, ...]
    ranks: Mapping[str, tuple[int, ...]]
    """The processes of each kind of group."""


@dataclass(frozen=True)
class Estimate:
    """A layout: its stages and its step."""

    stages: tuple[Stage, ...]
    batch: Batch
    seconds: float
    """Of a step."""
    parts: Seconds = field(default_factory=dict)
    """What takes the time of the slowest stage, and the pipeline's wait; the sum is `seconds`."""
    tokens_per_gpu: float = 0.0
    """Each second."""
    mfu: float = 0.0
    """Model FLOPs (without recomputation, by NeoX's convention) over the 16-bit peak."""

    @property
    def memory(self) -> RankMemory:
        """Of the fullest process."""
        return max((stage.memory for stage in self.stages), key=lambda memory: memory.total)

    @property
    def limit(self) -> str:
        """What takes most of the time."""
        return max(self.parts, key=lambda name: self.parts[name])


def estimate(config: NeoXConfig, vocabulary: int, cluster: Cluster, done: Callable[[], None] = lambda: None) -> Estimate:
    """The layout that the configuration says, on all GPUs. `done` is called after each stage. Raises ConfigError for one that does not work."""
    batch = _batch(config, cluster)
    pipe = config.parallel.layout.pipe
    per_stage = cluster.gpus // pipe
    stages = []
    for number in range(pipe):
        stages.append(_stage(config, vocabulary, cluster, number * per_stage))
        done()
    return put_together(config, vocabulary, cluster, tuple(stages), batch)


def _batch(config: NeoXConfig, cluster: Cluster) -> Batch:
    return resolve_batch(config.training, data_parallel_size(config, cluster.gpus))


def _stage(config: NeoXConfig, vocabulary: int, cluster: Cluster, rank: int) -> Stage:
    topology = Topology(cluster.gpus, rank, rank, config.parallel.layout)
    batch = _batch(config, cluster)
    with fake_process(topology) as groups:
        part = build_part(config, vocabulary, groups)
        parts = held(part, config, groups)
        step = Step(batch.micro, cluster.skew)
        prepare(config, part, groups, step)
        trace = trace_step(config, part, groups, step)
    add_sends(trace, config, batch.micro, topology.pipe_rank)
    parameters = sum(each.own for each in parts)
    memory = memory_of(config, parts, trace, in_flight(topology, batch))
    return Stage(rank, parameters, tuple(parts), trace, memory, sums_of(config, parts, groups, batch.accumulation), ranks_of(groups))


def in_flight(topology: Topology, batch: Batch) -> int:
    """Micro-batches whose activations a stage keeps at once, with one forward and one backward in turns."""
    return min(topology.layout.pipe - topology.pipe_rank, batch.accumulation)


def memory_of(config: NeoXConfig, parts: list[Held], trace: Trace, kept_at_once: int) -> RankMemory:
    """Bytes of a process. Of a layer, ZeRO 3 gathers the weights for a while."""
    gathered = 0
    if config.optimizer.zero_optimization.stage == 3:
        gathered = 2 * sum(part.own for part in parts) * (4 if config.precision == "fp32" else 2) // config.model.num_layers
    return RankMemory(
        weights=weight_bytes(parts, config),
        gradients=gradient_bytes(parts, config),
        optimizer=optimizer_bytes(parts, config),
        activations=trace.kept * kept_at_once,
        working=max(0, trace.peak - trace.kept) + gathered,
        buffers=buffer_bytes(parts, config),
    )


def sums_of(config: NeoXConfig, parts: list[Held], groups: Groups, micro_batches: int) -> tuple[Sums, ...]:
    """What processes exchange of weights and gradients in a step: sums of gradients, and under ZeRO the weights."""
    stage, weight = config.optimizer.zero_optimization.stage, 4 if config.precision == "fp32" else 2
    found = []
    for expert, group in ((False, groups.data), (True, groups.expert_data)):
        own = sum(part.own for part in parts if part.expert == expert)
        if group.size == 1 or not own:
            continue
        reduced = own * gradient_size(config)
        if stage == 3:
            found.append(Sums("allgather_", own * weight, group.ranks, 2 * micro_batches))
            found.append(Sums("reduce_scatter_", reduced, group.ranks, micro_batches))
        else:
            found.append(Sums("reduce_scatter_" if stage == 2 else "allreduce_", reduced, group.ranks, micro_batches if stage == 2 else 1))
            if stage:
                found.append(Sums("allgather_", own * weight, group.ranks, 1))
    return tuple(found)


def ranks_of(groups: Groups) -> dict[str, tuple[int, ...]]:
    """Kind -> the processes of this process's group."""
    return {kind: getattr(groups, kind).ranks for kind in Groups._fields} | {"world": groups.data.ranks}


def put_together(config: NeoXConfig, vocabulary: int, cluster: Cluster, stages: tuple[Stage, ...], batch: Batch) -> Estimate:
    """The step of all stages."""
    machine, stack = cluster.machine, cluster.stack
    copies = config.moe.top_k if config.moe.kernel_backends.get("dispatch") == "deep_ep" else 1
    micro = [micro_batch_seconds(stage.trace, machine, stack, stage.ranks, copies) for stage in stages]
    totals = [sum(seconds.values()) for seconds in micro]
    slowest = totals.index(max(totals))
    all_of_it, waiting = step_seconds(totals, batch.accumulation)
    parts: Seconds = {name: value * batch.accumulation for name, value in micro[slowest].items()}
    if len(stages) > 1:
        parts["waiting in the pipeline"] = waiting
    if not stack.fused:
        parts["adding up of gradients"] = max(adding_seconds(config, stage.parts, batch.accumulation, machine) for stage in stages)
    parts["sums of gradients and weights"] = max(sums_seconds(stage.sums, machine, stack) for stage in stages)
    parts["update of the weights"] = max(update_seconds(2.5 * stage.memory.optimizer, machine) for stage in stages)
    total = all_of_it + sum(parts.get(name, 0.0) for name in AFTER)
    tokens = batch.global_ * config.model.seq_length / total / cluster.gpus
    flops = flops_per_token(config.model, config.moe, vocabulary)
    return Estimate(stages, batch, total, parts, tokens, tokens * flops / machine.peak(wide=config.precision == "fp32"))


AFTER = ("adding up of gradients", "sums of gradients and weights", "update of the weights")
"""Parts of a step that are not in a micro-batch's trace."""


def adding_seconds(config: NeoXConfig, parts: Sequence[Held], micro_batches: int, machine: Machine) -> float:
    """Time of adding each micro-batch's gradients to the step's: the new ones are read, the sums are read and written. Where the formats are equal,
    the first ones are the sums. With ZeRO 2 and 3 each process adds up its share.
    """
    divided = config.optimizer.zero_optimization.stage >= 2
    numbers = sum(part.own / (part.copies if divided else 1) for part in parts)
    own, sums = (4 if config.precision == "fp32" else 2), (4 if config.sums_in_fp32 else 2)
    times = micro_batches if own != sums else micro_batches - 1
    return update_seconds(numbers * (own + 2 * sums) * times, machine)


def add_sends(trace: Trace, config: NeoXConfig, micro_batch: int, stage: int) -> None:
    """Adds what a stage sends to its neighbours for each micro-batch: hidden states to the next one, their gradients to the one before."""
    stages = config.parallel.layout.pipe
    width = 4 if config.precision == "fp32" else 2
    shared = config.parallel.model_parallel_size if config.parallel.sequence_parallel else 1
    neighbours = (stage > 0) + (stage < stages - 1)
    if neighbours:
        payload = micro_batch * config.model.seq_length * config.model.hidden_size * width // shared
        trace.messages[Message("send", "pipe", payload)] += neighbours


def collectives(stage: Stage, batch: Batch) -> dict[str, tuple[int, float]]:
    """`collective over group (processes)` -> (how often in a step, bytes in all)."""
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def add(message: Message, size: int, times: int) -> None:
        entry = found[f"{message.collective.strip('_')} of {message.group} ({size})"]
        entry[0] += times
        entry[1] += message.payload * times

    for message, count in stage.trace.messages.items():
        add(message, len(stage.ranks[message.group]), count * batch.accumulation)
    for each in stage.sums:
        kind = "data" if each.ranks == stage.ranks["data"] else "expert_data"
        add(Message(each.collective, kind, int(each.payload)), len(each.ranks), each.times)
    return {name: (int(count), payload) for name, (count, payload) in sorted(found.items())}


def check_layout(config: NeoXConfig, cluster: Cluster) -> None:
    """Raises PlanError or ConfigError with what does not fit."""
    most = max(1, config.parallel.layout.expert * config.parallel.layout.tensor)
    if not 1.0 <= cluster.skew <= max(most, 64):
        raise PlanError(f"--skew {cluster.skew:g}: must be from 1 (even) to 64; it is the rows of the fullest process over the mean")
    if not config.moe.has_experts and cluster.skew != 1.0:
        raise PlanError(f"--skew {cluster.skew:g}: this model has no experts, so nothing can be uneven; leave --skew out")
    node = cluster.machine.gpus_per_node
    nodes, rest = divmod(cluster.gpus, node)
    if nodes and rest:
        raise PlanError(
            f"--gpus {cluster.gpus}: is not a whole number of nodes of {node} GPUs; use {nodes * node} or {(nodes + 1) * node}, "
            "or say with --gpus-per-node how many a node has"
        )
    _batch(config, cluster)
