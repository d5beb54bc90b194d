"""What a pipeline must not change: weights that stages share, losses over layers and micro-batches, masks, documents, number formats, bad steps.

The plain models are in `test_layouts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megatron.testing.distributed import run_distributed
from tests.invariants.equivalence import MODELS, Comparison, Variant, compare, joined, measure

MIXTRAL = MODELS["mixtral"]
ZERO_1 = {"zero_optimization": {"stage": 1}}
TIED = {"no_weight_tying": False}
BF16 = {"precision": "bfloat16"}


def pipeline(stages: int = 2, replicas: int = 1, **keys: Any) -> Variant:
    return Variant(stages * replicas, {"pipe_parallel_size": stages, "num_layers": 4, "gradient_accumulation_steps": 2, **keys})


CASES: Mapping[str, tuple[Mapping[str, Any], Variant]] = {
    "tied words, learned positions": ({**TIED, "pos_emb": "learned"}, pipeline()),
    "tied words and a shared table of T5 positions": ({**TIED, "pos_emb": "rpe"}, pipeline(4)),
    "the same with ZeRO 1 on two replicas": ({**TIED, "pos_emb": "rpe"}, pipeline(2, 2, **ZERO_1)),
    "a loss over all layers": ({"moe_losses": {"joint_load_balance": 0.1, "z_loss": 0.01}}, pipeline(4)),
    "a loss over earlier micro-batches": ({"moe_losses": {"global_load_balance": 0.1}}, pipeline(gradient_accumulation_steps=4)),
    "dense layers between experts, as many weights on each": (
        {"moe_expert_interval": 2},
        pipeline(num_layers=5, pipe_partition_method="parameters"),
    ),
    "three stages, the first without experts": ({"moe_first_k_dense_layers": 3}, pipeline(3, num_layers=5, pipe_partition_method="uniform")),
    "routers with biases that balance them": ({"moe_router_type": "sigmoid", "moe_router_bias_update_rate": 0.01}, pipeline()),
    "routers that count scores, the first stage without experts": (
        {"moe_router_type": "quantile_balancing", "moe_first_k_dense_layers": 2},
        pipeline(gradient_accumulation_steps=2),
    ),
    "routers with thresholds": ({"moe_router_type": "expert_threshold", "moe_losses": {"z_loss": 0.01}}, pipeline(4)),
    "pools of documents": ({"moe_router_type": "document_pool", "moe_losses": {"global_load_balance": 0.1}}, pipeline()),
    "SGD with clipping": ({"optimizer": {"type": "SGD", "params": {"lr": 0.01}}, "gradient_clipping": 0.01}, pipeline()),
    "no clipping": ({"gradient_clipping": 0.0}, pipeline()),
}
QUICK = ("the same with ZeRO 1 on two replicas", "three stages, the first without experts")


@pytest.mark.parametrize("case", QUICK)
def test_a_pipeline_computes_what_one_process_computes(case: str) -> None:
    values, variant = CASES[case]
    assert compare({**MIXTRAL, **values}, variant, steps=3).problems() == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_pipeline_computes_what_one_process_computes(case: str) -> None:
    values, variant = CASES[case]
    assert compare({**MIXTRAL, **values}, variant).problems() == []


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_labels_that_do_not_count_and_documents(replicas: int, per_token: bool) -> None:
    """The loss is over all counted labels of the step, in all micro-batches and replicas, or the mean of the micro-batches' means."""
    apart = {"reset_attention_mask": True, "reset_position_ids": True, "calculate_per_token_loss": per_token}
    assert compare({**MIXTRAL, **apart}, pipeline(2, replicas), masked=True).problems() == []


@pytest.mark.parametrize(
    ("values", "variant"),
    [
        ({}, pipeline()),
        pytest.param({}, pipeline(2, 2, **ZERO_1), marks=pytest.mark.slow),
        pytest.param(BF16, pipeline(), marks=pytest.mark.slow),
    ],
    ids=["fp32", "fp32, ZeRO 1", "bf16"],
)
def test_a_step_that_is_not_finite_is_skipped_on_every_stage(values: Mapping[str, Any], variant: Variant) -> None:
    """The infinite number comes up on the last stage."""
    found = compare({**MIXTRAL, **values}, variant, steps=4, spoiled=1)
    assert found.problems() == []
    assert found.together.applied == [True, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "values", [{}, ZERO_1, {**ZERO_1, "data_types": {"grad_accum_dtype": "fp32"}}], ids=["ZeRO 0", "ZeRO 1", "ZeRO 1, fp32 sums"]
)
def test_in_bf16_a_pipeline_of_two_replicas_computes_the_bits_of_two_replicas(values: Mapping[str, Any]) -> None:
    keys = {**MIXTRAL, **BF16, **values, "num_layers": 4, "gradient_accumulation_steps": 2}
    replicas = run_distributed(measure, 2, keys, 3, backend=None)
    stages = run_distributed(measure, 4, {**keys, "pipe_parallel_size": 2}, 3, backend=None)
    found = Comparison(joined(replicas), joined(stages))
    assert (found.loss, found.auxiliary, found.gradient) == (0.0, 0.0, 0.0)
    assert found.norm < 1e-6


def test_without_replicas_every_loss_and_gradient_has_the_same_bits() -> None:
    """The same operations in the same order: nothing that travels between stages is rounded."""
    found = compare(MODELS["structmoe"], pipeline(), steps=3)
    assert (found.loss, found.auxiliary, found.gradient) == (0.0, 0.0, 0.0)
    assert found.together.loads == found.alone.loads
    assert found.together.logits.equal(found.alone.logits)
