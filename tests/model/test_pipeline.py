"""Stages: how layers are divided, what travels between two of them, and that together they are the whole model."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config.parallel import Layout, part_names
from megatron.model import build_cache, build_model
from megatron.model.divide import Divider
from megatron.model.pipeline import PartitionError, Stage, build_stage, carriers, divide_layers, parameter_counts
from megatron.model.state import LayerState, RouterReport
from megatron.mpu.groups import Group, Groups, make_groups
from megatron.mpu.topology import Topology
from megatron.testing.distributed import run_distributed
from tests.model.tiny_model import DENSE, VOCAB, model_section, moe_section, tokens

METHOD = "type:transformer|mlp"


def stage_of(rank: int, stages: int, *, model: Any = None, moe: Any = None, method: str = METHOD) -> Stage:
    """A stage that cannot communicate."""
    divider = Divider(Groups(pipe=Group(tuple(range(stages)), rank)))
    return build_stage(model or model_section(num_layers=4), moe or moe_section(), VOCAB, seed=1, method=method, divider=divider)


class Named(nn.Module):
    """Stands for one of NeoX's layers in DeepSpeed's own division."""

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weights))


def deepspeed_parts(names: list[str], counts: list[int], method: str, stages: int) -> list[int]:
    """The bounds that DeepSpeed's PipelineModule finds for layers of these names and sizes."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    class Divided(PipelineModule):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.global_rank, self.num_stages, self.loss_fn = 0, stages, None
            self._topo = PipeDataParallelTopology(stages, 1)
            self._layer_specs = [type(name, (Named,), {})(count) for name, count in zip(names, counts, strict=True)]
            self._partition_layers(method)

    with contextlib.redirect_stdout(io.StringIO()):
        return list(Divided().parts)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("method", [METHOD, "uniform", "parameters", "type:embedding|parallel"])
@pytest.mark.parametrize("untied", [True, False])
def test_layers_are_divided_as_deepspeed_divides_neox_s(method: str, stages: int, untied: bool) -> None:
    model, moe = model_section(num_layers=7, no_weight_tying=untied), moe_section(moe_expert_interval=2)
    spans = divide_layers(model, moe, VOCAB, method=method, stages=stages)
    bounds = deepspeed_parts(part_names(7, tied=not untied), parameter_counts(model, moe, VOCAB), method, stages)
    assert [span.start for span in spans] == bounds[:-1]
    assert [span.stop for span in spans] == bounds[1:]


def test_weights_are_counted_without_drawing_them() -> None:
    model, moe = model_section(num_layers=3, pos_emb="learned", no_weight_tying=True), moe_section(moe_expert_interval=2)
    counts, gpt = parameter_counts(model, moe, VOCAB), build_model(model, moe, VOCAB, seed=1)
    assert {str(number): count for number, count in enumerate(counts) if count} == {
        number: sum(weight.numel() for weight in part.parameters()) for number, part in gpt.sequential.items()
    }


@pytest.mark.parametrize(
    ("method", "stages", "sentence"),
    [
        ("uniform", 5, "'pipe_partition_method' = uniform: leaves stage .* of 5 without layers; use another method or fewer stages"),
    ],
)
def test_a_division_that_leaves_a_stage_empty_is_refused(method: str, stages: int, sentence: str) -> None:
    with pytest.raises(PartitionError, match=sentence):
        divide_layers(model_section(no_weight_tying=True), DENSE, VOCAB, method=method, stages=stages)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pos_emb", ["rotary", "learned", "rpe"])
def test_stages_have_the_weights_of_the_whole_model_under_their_names(tied: bool, pos_emb: str) -> None:
    model = model_section(num_layers=4, no_weight_tying=not tied, pos_emb=pos_emb)
    whole = build_model(model, moe_section(), VOCAB, seed=1).state_dict()
    parts = [stage_of(rank, 3, model=model) for rank in range(3)]
    for stage in parts:
        for name, value in stage.state_dict().items():
            assert torch.equal(value, whole[name]), name
    assert set().union(*(stage.state_dict() for stage in parts)) == set(whole)
    owners = {name: [s for s, stage in enumerate(parts) if name in stage.cuts and stage.cuts[name].spans[0][0].owned] for name in whole}
    tables = {name for name in whole if ".rpe." in name}
    assert all(len(owner) == 1 for name, owner in owners.items() if name not in tables), owners
    assert all(owner == [0] or not owner for name, owner in owners.items() if name in tables), "the first stage counts for the shared table"


def test_the_head_is_tied_to_words_and_not_to_positions() -> None:
    last = stage_of(1, 2, model=model_section(num_layers=4, no_weight_tying=False, pos_emb="learned"))
    assert [name for name in last.state_dict() if name.startswith("sequential.0.")] == ["sequential.0.word_embeddings.weight"]
    assert last.shared()[0][1] == [0, 1]


def test_the_report_has_the_same_widths_on_a_stage_without_experts() -> None:
    moe = moe_section(moe_first_k_dense_layers=3)
    first, last = (stage_of(rank, 2, moe=moe) for rank in range(2))
    whole = build_model(model_section(num_layers=4), moe, VOCAB, seed=1)
    assert first.report_widths == last.report_widths == whole.report_widths
    assert (first.moe_rows_before, last.moe_rows_before, last.moe_rows) == (0, 0, 1)
    assert [part.shape for part in first.empty_report()] == [part.shape for part in whole.empty_report()]


def test_a_stage_balances_its_own_routers_only() -> None:
    moe = moe_section(moe_router_type="sigmoid", moe_router_bias_update_rate=0.1)
    last = stage_of(1, 2, moe=moe)
    load_XE = torch.tensor([[9, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9]])
    last.update_balance(load_XE)
    biases = [layer.mlp.router.balance.state_dict() for layer in last.layers]  # type: ignore[union-attr]
    lowered = [next(iter(state.values())).argmin().item() for state in biases]
    assert lowered == [1, 2]


def exchange(grad: bool) -> tuple[list[Tensor], list[Tensor] | None]:
    """Two stages: the first sends a state, the second sends gradients back."""
    group = make_groups(Topology(2, torch.distributed.get_rank(), 0, Layout(pipe=2))).pipe
    moe = moe_section(moe_losses={"load_balance": 0.1, "joint_load_balance": 0.1})
    model = model_section(num_layers=4)
    stage = build_stage(model, moe, VOCAB, seed=1, method=METHOD, divider=Divider(Groups(pipe=group)))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 16, generator=generator).transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    report = RouterReport(
        torch.rand(2, 2, generator=generator),
        torch.tensor([[2**40 + 1, 2, 3], [4, 5, 6]]),
        torch.arange(24).view(2, 12),
        torch.rand(2, stage.report_widths[3], generator=generator),
    )
    state = LayerState(hidden.requires_grad_(grad), report, usage_2E=torch.rand(2, 3, generator=generator))
    if group.rank == 0:
        stage.send(state)
        return [*_flat(state)], stage.receive_gradients(state) if grad else None
    with torch.set_grad_enabled(grad):
        received = stage.receive((2, 5))
    if not grad:
        return _flat(received), None
    (carriers(received)[0].sum() * 3 + carriers(received)[2].sum() * 5).backward()
    stage.send_gradients(received)
    return _flat(received), None


def _flat(state: LayerState) -> list[Tensor]:
    assert state.usage_2E is not None
    return [tensor.detach() for tensor in (state.hidden_BSD, *state.report, state.usage_2E)]


@pytest.mark.parametrize("grad", [True, False])
def test_a_state_arrives_as_it_was_and_its_gradients_come_back(grad: bool) -> None:
    (sent, gradients), (received, _) = run_distributed(exchange, 2, grad)
    for left, right in zip(sent, received, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    if grad:
        assert gradients is not None
        assert [gradient.unique().tolist() for gradient in gradients] == [[3.0], [0.0], [5.0]], "the auxiliary losses were not used"


def run_pipeline(stages: int, pos_emb: str) -> list[Tensor]:
    """Logits of two texts of different lengths, losses of the second, all logits and the last ones of a text that a cache continues."""
    groups = make_groups(Topology(stages, torch.distributed.get_rank() if stages > 1 else 0, 0, Layout(pipe=stages)))
    model, moe = model_section(num_layers=4, pos_emb=pos_emb, no_weight_tying=False), moe_section()
    if stages == 1:
        gpt: Any = build_model(model, moe, VOCAB, seed=1).eval()
    else:
        gpt = build_stage(model, moe, VOCAB, seed=1, method="uniform" if stages == 3 else METHOD, divider=Divider(groups)).eval()
    outputs = []
    with torch.no_grad():
        outputs += [gpt(tokens(2, 5)).logits_BSV, gpt(tokens(3, 8)).logits_BSV]
        losses = gpt(tokens(3, 8), labels_BS=tokens(3, 8, seed=3))
        outputs += [groups.pipe.sum(losses.lm_loss), groups.pipe.sum(losses.token_loss_BS), *map(groups.pipe.sum, losses.report)]
        cache, text = build_cache(model, 1, 9), tokens(1, 9)
        outputs += [gpt(text[:, :4], cache=cache).logits_BSV, gpt(text[:, 4:5], cache=cache).logits_BSV, gpt(text[:, 5:], cache=cache).logits_BSV]
        cache = build_cache(model, 1, 9)
        outputs += [gpt.last_logits(text[:, :4], cache=cache), gpt.last_logits(text[:, 4:], cache=cache)]
    return [output.nan_to_num() for output in outputs]


@pytest.mark.parametrize(("stages", "pos_emb"), [(2, "learned"), (3, "rotary")])
def test_stages_evaluate_and_generate_as_the_whole_model(stages: int, pos_emb: str) -> None:
    expected = run_pipeline(1, pos_emb)
    for outputs in run_distributed(run_pipeline, stages, stages, pos_emb):
        for own, whole in zip(outputs, expected, strict=True):
            assert torch.equal(own, whole)
