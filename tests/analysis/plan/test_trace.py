"""A trace counts the work of a step: its products are those of the formula, and short traces make long ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megatron.analysis.plan.layouts import lengthened
from megatron.analysis.plan.rank import Step, build_part, fake_process, prepare, trace_step
from megatron.analysis.plan.trace import Trace
from megatron.config import config_from_dict
from megatron.config.size import flops_per_token
from megatron.mpu.topology import Topology
from tests.analysis.plan.measured import ROOMY
from tests.invariants.equivalence import MODELS

VOCABULARY = 128


def traced(values: Mapping[str, Any], processes: int = 1, skew: float = 1.0) -> Trace:
    config = config_from_dict(dict(values))
    with fake_process(Topology(processes, 0, 0, config.parallel.layout)) as groups:
        part = build_part(config, VOCABULARY, groups)
        step = Step(4, skew)
        prepare(config, part, groups, step)
        return trace_step(config, part, groups, step)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("recompute", [False, True])
def test_the_products_are_those_of_the_formula(name: str, recompute: bool) -> None:
    values = {**MODELS[name], **ROOMY, "checkpoint_activations": recompute}
    config, trace = config_from_dict(values), traced(values)
    tokens, length, model = 4 * config.model.seq_length, config.model.seq_length, config.model
    products = sum(work.flops * count for work, count in trace.work.items() if work.kind != "attention")
    scores = 4 * length * model.attention_width * model.num_layers
    expected = flops_per_token(model, config.moe, VOCABULARY, recompute=recompute) - (4 if recompute else 3) * scores
    if recompute:  # the head is never computed again, though the formula says so
        expected -= 2 * VOCABULARY * model.hidden_size
    assert products / tokens == pytest.approx(expected, rel=0.1 if recompute else 0.02)  # PyTorch leaves out the last products of a second forward


def test_two_short_traces_make_a_long_one() -> None:
    short, longer, whole = (traced({**MODELS["structmoe"], **ROOMY, "num_layers": layers}) for layers in (1, 2, 5))
    made = lengthened(short, longer, periods=5, head=True)
    for measure in (lambda work: work.flops, lambda work: work.moved):
        assert sum(measure(work) * count for work, count in made.work.items()) == pytest.approx(
            sum(measure(work) * count for work, count in whole.work.items()), rel=0.001
        )
    assert made.kept == pytest.approx(whole.kept, rel=0.01)
    assert made.peak == pytest.approx(whole.peak, rel=0.05)


def test_messages_of_every_kind_are_seen() -> None:
    values = {**MODELS["mixtral"], **ROOMY}
    tensor = traced({**values, "model_parallel_size": 2}, 2)
    hidden = 4 * 64 * 64 * 4
    assert {message.group for message in tensor.messages} == {"tensor"}
    assert [count for message, count in tensor.messages.items() if message.collective == "allreduce_" and message.payload == hidden] == [2 + 2 * 4]
    expert = traced({**values, "moe_expert_parallel_size": 2}, 2)
    rows = [message.payload for message in expert.messages if message.collective == "alltoall_base_"]
    assert max(rows) == 2 * hidden  # two experts for each token


def test_a_skewed_process_has_more_work_and_keeps_more() -> None:
    values = {**MODELS["mixtral"], **ROOMY, "moe_expert_parallel_size": 2}
    even, skewed = traced(values, 2), traced(values, 2, skew=1.5)
    assert skewed.flops > even.flops
    assert skewed.kept > even.kept


def test_a_plan_inside_a_process_group_is_refused() -> None:
    with fake_process(Topology(2, 0, 0)), pytest.raises(RuntimeError, match="joined a process group"), fake_process(Topology(2, 0, 0)):
        pass
