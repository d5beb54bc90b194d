"""What real processes hold: bytes of weights, of the optimizer, and of what a forward keeps. And the same of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.analysis.plan.memory import held, optimizer_bytes, weight_bytes
from megatron.analysis.plan.rank import Step, build_part, fake_process, prepare, trace_step
from megatron.analysis.plan.trace import kept_bytes
from megatron.config import config_from_dict
from megatron.config.training import resolve_batch
from megatron.mpu.topology import Topology

VOCABULARY = 128
PIPELINE = {"num_layers": 4, "gradient_accumulation_steps": 2}
ROOMY: dict[str, Any] = {"hidden_size": 64, "seq_length": 64, "max_position_embeddings": 64, "train_micro_batch_size_per_gpu": 4}
"""Large enough that the numbers of every layer outweigh the counts beside them."""


class Held(NamedTuple):
    """Bytes of one process."""

    weights: int
    optimizer: int
    kept: int


def measure(values: Mapping[str, Any]) -> Held:
    """On each of several processes: builds model and engine, takes two steps, counts."""
    from megatron.training.engine import build_engine
    from megatron.training.process import start_process
    from megatron.training.setup import model_of_process
    from megatron.training.step import take_step
    from tests.invariants.equivalence import samples

    config = config_from_dict(dict(values))
    topology = start_process(backend="gloo", threads=1, layout=config.parallel.layout)
    engine = build_engine(config, model_of_process(config, VOCABULARY), world_size=topology.data_parallel_size)
    part = engine.module.stage if hasattr(engine.module, "stage") else engine.module
    kept: list[int] = []
    name = "run" if hasattr(engine.module, "stage") else "forward"
    run = getattr(part, name)

    def counted(*given: Any, **named: Any) -> Any:
        with kept_bytes(iter([*part.parameters(), *part.buffers()])) as bytes_so_far:
            output = run(*given, **named)
            kept.append(bytes_so_far())
        return output

    setattr(part, name, counted)
    data = samples(config, topology.data_parallel_size, topology.data_parallel_rank)
    for _ in range(2):
        take_step(engine, data, learning_rate=1e-3, masked_token=None, before_update=lambda: None)
    weights = sum(getattr(weight, "ds_tensor", weight).nbytes for weight in part.parameters())
    return Held(weights, sum(tensor.nbytes for tensor in updated(engine.optimizer)), kept[0])


def updated(optimizer: Any) -> Iterator[Tensor]:
    """The averages of everything that the optimizer updates, and the float32 copies of the weights."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for parts in ("fp32_groups", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        copies = getattr(optimizer, parts, [])
        yield from (tensor for group in copies for tensor in (group if isinstance(group, list) else [group]))
    for state in inner.state.values():
        yield from (value for name, value in state.items() if torch.is_tensor(value) and name != "step")


def planned(values: Mapping[str, Any], processes: int, rank: int) -> Held:
    """The same without processes."""
    config = config_from_dict(dict(values))
    topology = Topology(processes, rank, rank, config.parallel.layout)
    with fake_process(topology) as groups:
        part = build_part(config, VOCABULARY, groups)
        step = Step(resolve_batch(config.training, topology.data_parallel_size).micro, device="cpu")
        parts = held(part, config, groups)
        prepare(config, part, groups, step)
        kept = trace_step(config, part, groups, step).kept
    return Held(weight_bytes(parts, config), optimizer_bytes(parts, config), kept)
