"""The numbers of a model's routers for every sink: of each MoE layer (a list, first layer first), and of all layers together.

Shapes: X MoE layers; E experts of a layer; G LoREs of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megatron.model.moe.layer import STATISTICS
from megatron.monitor.sink import Value

if TYPE_CHECKING:
    from megatron.config.moe import MoEConfig
    from megatron.model.state import RouterReport


def router_values(report: RouterReport, moe: MoEConfig, num_layers: int) -> dict[str, Value]:
    """Under `moe/`; empty for a dense model.

    expert_load, lore_load     tokens of each expert and LoRE of each layer
    load_imbalance             the busiest expert's load over the mean one: 1 is even
    delta_uniform              mean over experts of |share of tokens - 1/E|, in percent (CoSMoEs, section 3.3)
    dead_experts, dead_lores   how many got no token
    router_entropy             in nats, at most log E
    expert_replacement         ExRep: experts that the token before did not use, in percent (CoSMoEs, equations 4 and 5)
    zero_computation           choices of zero, copy and constant experts, in percent; only where there are such experts
    experts_per_token          differs from K where a router chooses the number
    process_overload           with expert parallelism: the most rows that a process received over the mean; 1 is even
    overload_seconds           the time that this costs for each micro-batch (on CPUs)
    dropped_tokens             always 0: experts have no capacity limit
    <loss>_by_layer            each auxiliary loss, unweighted; for `joint_load_balance`, a loss over all layers, the part of each layer
    """
    if not len(report.expert_load_XE):
        return {}
    sections = list(moe.for_layers(num_layers).values())
    counts = [section.num_choices for section in sections]
    loads = [load_E[:count] for load_E, count in zip(report.expert_load_XE, counts, strict=True)]
    columns: dict[str, list[float]] = {
        "load_imbalance": [imbalance(load_E) for load_E in loads],
        "delta_uniform": [delta_uniform(load_E) for load_E in loads],
    }
    sent = not report.statistics_XI[:, STATISTICS.index("process_overload")].isnan().all()
    measured = [name for name in STATISTICS if sent or "overload" not in name]
    columns |= {name: report.statistics_XI[:, STATISTICS.index(name)].tolist() for name in measured}
    columns["expert_replacement"] = [100 * share for share in columns["expert_replacement"]]
    columns |= {f"{name}_by_layer": report.aux_losses_XA[:, i].tolist() for i, name in enumerate(moe.moe_losses)}

    values: dict[str, Value] = {"moe/expert_load": [load_E.tolist() for load_E in loads], "moe/dropped_tokens": 0}
    values |= {f"moe/{name}": sum(column) / len(column) for name, column in columns.items() if not name.endswith("_by_layer")}
    values |= {f"moe/{name if name.endswith('_by_layer') else name + '_by_layer'}": column for name, column in columns.items()}
    values |= dead("experts", loads)
    if moe.num_zero_computation:
        shares = [float(load_E[own.num_experts :].sum() / load_E.sum().clamp(min=1)) for load_E, own in zip(loads, sections, strict=True)]
        values |= {"moe/zero_computation": 100 * sum(shares) / len(shares), "moe/zero_computation_by_layer": [100 * share for share in shares]}
    if report.lore_load_XG.numel():
        lores = [load_G[: own.num_experts * moe.moe_num_lores] for load_G, own in zip(report.lore_load_XG, sections, strict=True)]
        values |= {"moe/lore_load": [load_G.tolist() for load_G in lores], **dead("lores", lores)}
    return values


def imbalance(load_E: Tensor) -> float:
    """The largest load over the mean; 1 where nothing was routed."""
    return float(load_E.max() / load_E.double().mean()) if load_E.any() else 1.0


def delta_uniform(load_E: Tensor) -> float:
    """Mean over experts of the difference between their share of the load and an even one, in percent."""
    share_E = load_E.double() / load_E.sum().clamp(min=1)
    return float(100 * (share_E - 1 / len(load_E)).abs().mean())


def dead(what: str, loads: list[Tensor]) -> dict[str, Value]:
    """How many experts or LoREs got nothing: in each layer, and in all layers."""
    by_layer: list[float] = [int((load == 0).sum()) for load in loads]
    return {f"moe/dead_{what}": sum(by_layer), f"moe/dead_{what}_by_layer": by_layer}
