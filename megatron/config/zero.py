"""DeepSpeed's own settings under `zero_optimization`: their names, what each may hold, and which cannot be used here.

A copy of what DeepSpeed's DeepSpeedZeroConfig accepts, so that a mistake is found without importing DeepSpeed; tests/config/test_deepspeed_json.py
compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.components import did_you_mean
from megatron.config.offload import OFFLOADS, offload_problem, offloaded, stage_problems
from megatron.config.section import Problem

# Names that DeepSpeed also takes with `stage3_` before them.
STAGE3_SWITCHES = frozenset({"gather_16bit_weights_on_model_save", "use_all_reduce_for_fetch_params", "allgather_sequential"})
STAGE3_COUNTS: dict[str, int | None] = {
    "prefetch_bucket_size": 0,
    "param_persistence_threshold": 0,
    "model_persistence_threshold": 0,
    "max_live_parameters": 0,
    "max_reuse_distance": 0,
    "module_granularity_threshold": None,
}
SWITCHES = frozenset(
    {
        "allgather_partitions",
        "compute_grad_norm",
        "contiguous_gradients",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "overlap_comm",
        "override_module_apply",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage3_gather_fp16_weights_on_model_save",
        "use_multi_rank_bucket_allreduce",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
        *STAGE3_SWITCHES,
        *(f"stage3_{key}" for key in STAGE3_SWITCHES),
    }
)
COUNTS: dict[str, int | None] = {
    "allgather_bucket_size": 0,
    "reduce_bucket_size": 1,
    "sub_group_size": 0,
    "zero_hpz_partition_size": 0,
    **STAGE3_COUNTS,
    **{f"stage3_{key}": smallest for key, smallest in STAGE3_COUNTS.items()},
}
"""Whole numbers, with the smallest that is allowed (None: any)."""
LEAF_MODULE_KEYS = ("classes", "names", "name_suffixes")
ZERO_KEYS = frozenset({*SWITCHES, *COUNTS, *OFFLOADS, "leaf_module"})

_REFUSED_VALUES = {
    ("legacy_stage1", True): "DeepSpeed has removed its old stage 1; remove the setting",
    ("compute_grad_norm", False): "every step needs the norm of the gradient, to record it and to skip bad steps; remove the setting",
}


def zero_problems(given: Mapping[str, Any], stage: int) -> Iterator[Problem]:
    """What is wrong with the settings beside `stage`."""
    problems = list(_single_problems(given))
    yield from problems
    for key, other in _double_names(given):
        yield Problem((f"zero_optimization.{key}",), f"is another name of '{other}', which is given too; keep one of them")
    if not any(key in OFFLOADS for problem in problems for key in problem.keys[0].split(".")):
        for key, message in stage_problems(given, stage):
            yield Problem((f"zero_optimization.{key}", "zero_optimization.stage"), message)


def _single_problems(given: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with one setting alone."""
    for key, value in given.items():
        entry, message = offload_problem(key, value) if key in OFFLOADS else ("", _unknown(key) or _wrong_value(key, value))
        if message:
            yield Problem((f"zero_optimization.{key}.{entry}" if entry else f"zero_optimization.{key}",), message)


def deepspeed_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as DeepSpeed is given them."""
    return {key: value for key, value in given.items() if key not in OFFLOADS} | offloaded(given)


def _unknown(key: str) -> str:
    return "" if key in ZERO_KEYS else f"DeepSpeed has no such setting{did_you_mean(key, ('stage', *ZERO_KEYS))}"


def _wrong_value(key: str, value: Any) -> str:
    """The sentence on a value that a known setting cannot hold; empty when it can."""
    if key in SWITCHES:
        return _switch_message(key, value)
    if key in COUNTS:
        return _count_message(value, COUNTS[key])
    return _leaf_message(value)


def _switch_message(key: str, value: Any) -> str:
    if value is None and key == "overlap_comm":
        return ""  # DeepSpeed's choice
    if not isinstance(value, bool):
        return "must be true or false"
    return _REFUSED_VALUES.get((key, value), "")


def _count_message(value: Any, smallest: int | None) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        return "must be a whole number"
    return "" if smallest is None or value >= smallest else f"must be at least {smallest}"


def _leaf_message(value: Any) -> str:
    allowed = f"must be a dictionary of {', '.join(LEAF_MODULE_KEYS)}, each a list of names"
    if value is None:
        return ""
    if not isinstance(value, dict) or any(key not in LEAF_MODULE_KEYS for key in value):
        return allowed
    lists = [[names] if isinstance(names, str) else names for names in value.values()]
    return "" if all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists) else allowed


def _double_names(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in (*STAGE3_SWITCHES, *STAGE3_COUNTS):
        if key in given and f"stage3_{key}" in given:
            yield f"stage3_{key}", key
    old, new = "stage3_gather_fp16_weights_on_model_save", "gather_16bit_weights_on_model_save"
    if old in given and (new in given or f"stage3_{new}" in given):
        yield old, new
