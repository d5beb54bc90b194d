"""The whole model: names and shapes on disk, losses, recomputation, precision, and inputs that do not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.kernels.registry import KernelUnavailable
from megatron.model import build_cache
from megatron.model.embedding import LossMask
from megatron.model.gpt import InputError
from tests.model.tiny_model import DENSE, LOSSES, VOCAB, model_section, moe_section, tiny_model, tokens

REPOSITORY = Path(__file__).resolve().parents[2]


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_names_and_shapes_are_neox_s() -> None:
    model = tiny_model(model_section(num_layers=2, norm="rmsnorm", no_weight_tying=True, pos_emb="learned"), moe_section(moe_expert_interval=2))
    common = {
        "input_layernorm.scale": (16,),
        "attention.query_key_value.weight": (48, 16),
        "attention.query_key_value.bias": (48,),
        "attention.dense.weight": (16, 16),
        "attention.dense.bias": (16,),
        "post_attention_layernorm.scale": (16,),
    }
    experts = {
        "mlp.router.layer.weight": (3, 16),
        "mlp.experts.mlp.w1": (72, 16),
        "mlp.experts.mlp.w2": (72, 16),
        "mlp.experts.lores.router": (12, 16),
        "mlp.experts.lores.a": (36, 16),
        "mlp.experts.lores.b": (36, 24),
    }
    dense = {"mlp.linear1.weight": (24, 16), "mlp.linear1.bias": (24,), "mlp.linear2.weight": (16, 24), "mlp.linear2.bias": (16,)}
    assert shapes(model) == {
        "sequential.0.word_embeddings.weight": (VOCAB, 16),
        "sequential.0.position_embeddings.weight": (16, 16),
        **{f"sequential.2.{name}": shape for name, shape in (common | experts).items()},
        **{f"sequential.3.{name}": shape for name, shape in (common | dense).items()},
        "sequential.5.norm.scale": (16,),
        "sequential.6.final_linear.weight": (VOCAB, 16),
    }
    assert set(model.state_dict()) == set(shapes(model)), "buffers would be unknown to NeoX"


def test_a_tied_head_owns_nothing() -> None:
    assert not [name for name in shapes(tiny_model()) if "final_linear" in name]


@pytest.mark.parametrize("gated", [False, True])
def test_parameter_count(gated: bool) -> None:
    model = tiny_model(model_section(activation="swiglu" if gated else "gelu", num_kv_heads=2, no_weight_tying=True), moe_section())
    d, f, e, m, q = 16, 24, 3, 4, 3
    attention = (d + 1) * (16 + 2 * 2 * 4) + (d + 1) * d
    experts = e * (2 + gated) * d * f + e * d + e * m * (d + q * (d + f))
    assert sum(p.numel() for p in model.parameters()) == 2 * VOCAB * d + 2 * (attention + experts + 4 * d) + 2 * d


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_cross_entropy_plus_the_weighted_losses(tied: bool) -> None:
    model, text = tiny_model(model_section(no_weight_tying=not tied)), tokens()
    mask = (torch.arange(8) > 2).float().expand(2, 8)
    out = model(text[:, :-1], labels_BS=text[:, 1:], loss_mask=LossMask(mask))
    logits = model(text[:, :-1]).logits_BSV
    token_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none").view(2, 8)
    torch.testing.assert_close(out.token_loss_BS, token_loss.detach())
    torch.testing.assert_close(out.lm_loss, (token_loss * mask).sum() / mask.sum())
    torch.testing.assert_close(out.loss, out.lm_loss + 0.01 * out.aux_losses_A[0] + 0.001 * out.aux_losses_A[1])
    assert out.logits_BSV is None
    assert out.aux_losses_A.dtype == torch.float32


def test_auxiliary_losses_are_summed_over_the_layers_in_the_order_of_the_config() -> None:
    first = tiny_model(moe=moe_section(moe_losses={"load_balance": 1.0, "z_loss": 2.0}))(tokens()).aux_losses_A
    second = tiny_model(moe=moe_section(moe_losses={"z_loss": 2.0, "load_balance": 1.0}))(tokens()).aux_losses_A
    assert first.tolist() == second.flip(0).tolist()
    assert first[0] >= 1.9, "two layers, each near 1 or above"


def test_without_experts_there_are_no_loads() -> None:
    out = tiny_model(moe=DENSE)(tokens())
    assert out.aux_losses_A.shape == (0,)
    assert out.report.expert_load_XE.shape == (0, 0)
    assert out.report.lore_load_XG.shape == (0, 0)
    assert tiny_model(moe=moe_section(moe_expert_type="grouped"))(tokens()).report.lore_load_XG.shape == (2, 0)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(3)
    out = model(tokens()[:, :-1], labels_BS=tokens()[:, 1:])
    out.loss.backward()
    return [out.loss.detach(), out.aux_losses_A.detach(), out.report.lore_load_XG, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_changes_nothing(group: int, dropout: float) -> None:
    section = model_section(num_layers=3, hidden_dropout=dropout, attention_dropout=dropout)
    plain, recomputed = (tiny_model(section, moe_section(moe_jitter_eps=0.1)) for _ in range(2))
    recomputed.enable_activation_checkpointing(group)
    for one, two in zip(gradients(plain), gradients(recomputed), strict=True):
        assert torch.equal(one, two)


def test_two_runs_are_equal_bit_for_bit() -> None:
    assert all(torch.equal(one, two) for one, two in zip(gradients(tiny_model()), gradients(tiny_model()), strict=True))


def test_dropout_is_of_training_and_follows_the_random_state() -> None:
    model = tiny_model(model_section(hidden_dropout=0.5))

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(tokens()).logits_BSV

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


@pytest.mark.parametrize("expert_type", ["grouped", "structmoe"])
def test_bfloat16(expert_type: str) -> None:
    section = moe_section(moe_expert_type=expert_type, moe_lore_top_k=2)
    low, full = tiny_model(moe=section, dtype=torch.bfloat16), tiny_model(moe=section)
    out = low(tokens()[:, :-1], labels_BS=tokens()[:, 1:])
    out.loss.backward()
    assert out.lm_loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in low.parameters())
    assert out.lm_loss.item() == pytest.approx(full(tokens()[:, :-1], labels_BS=tokens()[:, 1:]).lm_loss.item(), rel=0.1)
    assert low(tokens()).logits_BSV.dtype == torch.bfloat16


def test_a_model_learns() -> None:
    model = tiny_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        out = model(tokens()[:, :-1], labels_BS=tokens()[:, 1:])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.lm_loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens_BS": tokens()[0]}, r"tokens of shape \(9,\) and dtype torch.int64: must be integers \[batch, sequence\]"),
        ({"tokens_BS": tokens()[:, :0]}, "neither empty"),
        ({"tokens_BS": tokens().float()}, "dtype torch.float32: must be integers"),
        ({"tokens_BS": tokens(1, 17)}, "0 \\+ 17 tokens: the model has positions for 16"),
        ({"tokens_BS": tokens(), "labels_BS": tokens()[:, 1:]}, r"labels of shape \(2, 8\): must have the tokens' shape \(2, 9\)"),
        ({"tokens_BS": tokens(), "labels_BS": tokens(), "loss_mask": LossMask(torch.ones(2, 8))}, r"loss mask of shape \(2, 8\)"),
        ({"tokens_BS": tokens(), "document_BS": tokens()[:, 1:]}, r"documents of shape \(2, 8\): must have the tokens' shape \(2, 9\)"),
        ({"tokens_BS": tokens(), "document_BS": tokens()}, "documents were given, but this model does not separate them \\(reset_attention_mask"),
        (
            {"tokens_BS": tokens(), "document_BS": tokens(), "cache": build_cache(model_section(), 2, 9)},
            "documents were given, but a cache holds one",
        ),
        ({"tokens_BS": tokens(), "cache": build_cache(model_section(num_layers=3), 2, 9)}, "a cache of 3 layers: the model has 2"),
    ],
)
def test_inputs_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_model()(**given)


def test_a_group_of_layers_has_at_least_one() -> None:
    with pytest.raises(InputError, match="checkpoint_num_layers = 0: must be at least 1"):
        tiny_model().enable_activation_checkpointing(0)


def test_a_kernel_that_cannot_run_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(KernelUnavailable, match="there is no implementation 'trition'; known: auto, compiled, cuda, triton, reference"):
        tiny_model(moe=moe_section(kernel_backends={"grouped_gemm": "trition"}))


def test_losses_of_the_config_are_all_named() -> None:
    assert len(tiny_model().coefficients) == len(LOSSES)


def test_a_step_does_not_load_the_compiler() -> None:
    """Importing torch's compiler takes two seconds of every start, and nothing here is compiled."""
    program = (
        "import sys; from tests.model.tiny_model import tiny_model, tokens\n"
        "tiny_model()(tokens()[:, :-1], labels_BS=tokens()[:, 1:]).loss.backward()\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
