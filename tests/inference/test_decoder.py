"""The compiled runner against the model's own forward: every kind of layer, batches of texts of different lengths, prompts, int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.inference.decoder.build import as_it_lies, build_decoder
from megatron.inference.decoder.int8 import round_to_int8
from megatron.inference.decoder.runner import CompiledRunner, reason_against
from megatron.inference.errors import InferenceError
from megatron.inference.model import Decoding, ReadyModel
from megatron.inference.routing_trace import RoutingTrace
from megatron.inference.runner import ModuleRunner, Runner, build_runner
from megatron.kernels.compiled import load
from megatron.kernels.registry import KernelUnavailable
from megatron.model import build_model, choose_implementations
from megatron.model.attention import CacheError

needs_kernels = pytest.mark.skipif(load()[0] is None, reason=f"the compiled kernels cannot be used: {load()[1]}")
VOCABULARY = 90
TOKENS = torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(0)).tolist()
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "norm": "rmsnorm",
    "pos_emb": "rotary",
    "activation": "swiglu",
    "no_weight_tying": True,
}
MOE: dict[str, Any] = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk"}
LORES = MOE | {"moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_top_k": 2, "moe_lore_rank": 8, "moe_lore_init": "layer"}
NEOX = {"norm": "layernorm", "activation": "gelu", "gpt_j_residual": True, "rotary_pct": 0.25, "no_weight_tying": False}

SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {}),
    "neox": (NEOX | {"use_bias_in_attn_linear": True}, {}),
    "one norm for both": (NEOX | {"gpt_j_tied": True}, {}),
    "learned positions": ({"pos_emb": "learned"}, {}),
    "sinusoidal positions": ({"pos_emb": "sinusoidal"}, {}),
    "alibi": ({"pos_emb": "alibi"}, {}),
    "no positions": ({"pos_emb": "none"}, {}),
    "few key heads and a window": ({"num_kv_heads": 2, "sliding_window_width": 5}, {}),
    "norms of each head": ({"qk_norm_per_head": True}, {}),
    "norms of all heads": ({"qk_norm_all_heads": True}, {}),
    "olmo 2": ({"reordered_norm": True, "qk_norm_all_heads": True}, {}),
    "experts": ({}, MOE),
    "experts beside attention": (NEOX, MOE),
    "olmo 2 with experts": ({"reordered_norm": True}, MOE),
    "experts with biases": ({"activation": "gelu"}, MOE | {"moe_expert_bias": True}),
    "normalised and scaled": ({}, MOE | {"moe_normalize_top_k": True, "moe_router_topk_scaling_factor": 2.5}),
    "sinkhorn": ({}, MOE | {"moe_router_type": "sinkhorn"}),
    "sinkhorn, one expert": ({}, MOE | {"moe_router_type": "sinkhorn", "moe_top_k": 1}),
    "sigmoid": ({}, MOE | {"moe_router_type": "sigmoid"}),
    "document pools": ({}, MOE | {"moe_router_type": "document_pool", "moe_max_document_expert_pool": 3}),
    "smoe_dropout": ({}, MOE | {"moe_router_type": "smoe_dropout", "moe_top_k": 3, "moe_router_start_k": 2}),
    "smoe_dropout, fewer": ({}, MOE | {"moe_router_type": "smoe_dropout", "moe_top_k": 4, "moe_router_eval_k": 3}),
    "shared expert": ({}, MOE | {"moe_num_shared_experts": 1}),
    "gated shared expert": ({}, MOE | {"moe_num_shared_experts": 1, "moe_shared_expert_gate": True}),
    "decomposed": ({}, MOE | {"moe_expert_type": "decomposed"}),
    "LoREs": ({"activation": "gelu"}, LORES),
    "LoREs on the gate": ({}, LORES | {"moe_lore_projection": "gate"}),
    "LoREs on both": ({}, LORES | {"moe_lore_projection": "both"}),
    "LoREs that are always on": ({}, LORES | {"moe_lore_routed": False, "moe_lore_top_k": 1}),
    "dense and expert layers": ({"num_layers": 4}, MOE | {"moe_expert_interval": 2}),
}
PARTLY: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "relative positions": ({"pos_emb": "rpe"}, {}, "relative positions"),
    "weights for each head": ({"use_qk_layernorm": True}, {}, "use_qk_layernorm"),
    "groups of experts": (
        {},
        MOE | {"moe_num_experts": 8, "moe_router_type": "sigmoid", "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        "the choice of a SigmoidRouter",
    ),
    "top p": ({}, MOE | {"moe_router_type": "top_p"}, "the choice of a TopPRouter"),
    "quantile balancing": ({}, MOE | {"moe_router_type": "quantile_balancing"}, "the choice of a QuantileBalancingRouter"),
    "expert threshold": ({}, MOE | {"moe_router_type": "expert_threshold"}, "the choice of a ExpertThresholdRouter"),
    "latent experts": ({}, LORES | {"moe_latent_size": 16}, "a latent projection around the experts"),
    "constant experts": ({}, LORES | {"moe_copy_experts": 1, "moe_constant_experts": 2}, "zero, copy and constant experts"),
    "a residual MLP": ({}, MOE | {"moe_use_residual": True}, "a ResidualMLP beside the experts"),
    "LoREs beside the expert": ({}, LORES | {"moe_lore_interaction": "standalone"}, "experts of the kind StandaloneExperts"),
    "LoREs as a gate": ({}, LORES | {"moe_lore_interaction": "gated"}, "experts of the kind LoreGatedExperts"),
}
"""With what the model's own modules compute."""


class NoText:
    """A tokenizer for numbers alone."""

    eod = None
    vocab_size = VOCABULARY


def ready_model(model: dict[str, Any], moe: dict[str, Any], dtype: torch.dtype = torch.float32, decoding: Decoding | None = None) -> ReadyModel:
    sizes, experts = ModelConfig(**(BASE | model)), MoEConfig(**moe)
    gpt = build_model(sizes, experts, 128, seed=0, dtype=dtype)
    for weight in gpt.parameters():
        if weight.ndim > 1:
            weight.data.mul_(4)  # so that experts differ and choices are clear
    choose_implementations(sizes, experts, gpt)
    tokenizer: Any = NoText()
    return ReadyModel(
        gpt.eval().requires_grad_(False), tokenizer, sizes, torch.device("cpu"), Path("tiny"), None, (), decoding or Decoding(backend="compiled")
    )


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def compare(ours: Runner, theirs: Runner, tolerance: float = 1e-5) -> None:
    """Prompts of different lengths, then several tokens of all texts together."""
    mine, other = [[runner.open(50) for _ in range(3)] for runner in (ours, theirs)]
    for text, (a, b) in enumerate(zip(mine, other, strict=True)):
        prompt = TOKENS[: 1 + 11 * text]
        near(ours.prefill(a, prompt), theirs.prefill(b, prompt), tolerance)
    for step in range(4):
        tokens = TOKENS[step : step + 3]
        near(ours.decode(mine, tokens), theirs.decode(other, tokens), tolerance)
    assert [state.length for state in mine] == [state.length for state in other]


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", SERVED)
def test_every_kind_of_layer(case: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ready = ready_model(*SERVED[case])
    decoder = build_decoder(ready.gpt, ready.sizes, VOCABULARY, as_it_lies)
    assert decoder.modules == {}
    compare(CompiledRunner(ready, decoder, whole_prompts=True), ModuleRunner(ready))


@needs_kernels
@pytest.mark.parametrize("case", PARTLY)
def test_what_the_kernels_do_not_serve_is_computed_by_the_models_own_modules(case: str) -> None:
    model, moe, what = PARTLY[case]
    ready = ready_model(model, moe)
    decoder = build_decoder(ready.gpt, ready.sizes, VOCABULARY, as_it_lies)
    ((named, layers),) = decoder.modules.items()
    assert what in named
    assert layers == 2
    compare(CompiledRunner(ready, decoder, whole_prompts=True), ModuleRunner(ready))


def all_logits(runner: Runner) -> Tensor:
    """Those of a prompt and of some tokens after it."""
    state = runner.open(50)
    return torch.stack([runner.prefill(state, TOKENS[:9]), *(runner.decode([state], [token])[0] for token in TOKENS[9:30])])


@needs_kernels
@pytest.mark.parametrize("case", ["experts", "LoREs", "decomposed", "neox"])
def test_bfloat16_is_more_exact_than_in_the_models_forward(case: str) -> None:
    """Both are measured against the same weights in float32."""
    ready, exact = ready_model(*SERVED[case], torch.bfloat16), ready_model(*SERVED[case])
    for weight, wide in zip(ready.gpt.parameters(), exact.gpt.parameters(), strict=True):
        wide.data.copy_(weight.data)
    wanted = all_logits(ModuleRunner(exact))
    ours, theirs = ((all_logits(runner) - wanted).square().mean(1).median() for runner in (build_runner(ready), ModuleRunner(ready)))
    assert 0 < ours < theirs / 10  # the median, because a rounded logit may choose another expert
    assert theirs < 1e-2 * wanted.square().mean()


@needs_kernels
@pytest.mark.parametrize("case", ["neox", "few key heads and a window", "LoREs on both", "decomposed", "gated shared expert"])
def test_texts_do_not_change_each_other(case: str) -> None:
    """A text's logits are the same bits alone and among seven others."""
    ready = ready_model(*SERVED[case])
    runner = build_runner(ready)
    alone, together = runner.open(40), [runner.open(40) for _ in range(8)]
    for text, state in enumerate(together):
        runner.prefill(state, TOKENS[text : text + 3 + 2 * text])
    runner.prefill(alone, TOKENS[5 : 5 + 3 + 10])
    for token in TOKENS[:5]:
        assert runner.decode(together, [token] * 8)[5].equal(runner.decode([alone], [token])[0])


@needs_kernels
def test_the_trace_is_the_modules() -> None:
    ready = ready_model(*SERVED["LoREs"])
    traces = []
    for runner in (build_runner(ready), ModuleRunner(ready)):
        trace, states = RoutingTrace(), [runner.open(30) for _ in range(2)]
        for text, state in enumerate(states):
            runner.prefill(state, TOKENS[text : text + 6], trace)
        runner.decode(states, [3, 4], trace)
        traces.append([(token.experts, token.lores) for token in trace.tokens()])
    assert traces[0] == traces[1]
    assert len(traces[0]) == 6 + 6 + 2


@needs_kernels
@pytest.mark.parametrize("case", ["experts", "LoREs", "decomposed", "gated shared expert", "neox", "top p"])
def test_int8(case: str) -> None:
    """The int8 runner computes with the rounded weights, for prompts too, and the model's own weights are gone.

    The rows that it rounds to 16 bits change logits by up to 1.5e-4 of the largest; int8 weights change them by 5e-3 to 1e-2.
    `tests/kernels/test_decode.py` holds the products themselves to 2e-5 of their definition, which rounds in the same way.
    """
    rounded = ready_model(*SERVED.get(case, PARTLY.get(case, ((), ()))[:2]))
    untied = ready_model(*SERVED.get(case, PARTLY.get(case, ((), ()))[:2]), decoding=Decoding(weights="int8"))
    words = rounded.gpt.sequential["0"].word_embeddings.weight
    before, whole = words.data.clone(), sum(p.numel() for p in untied.gpt.parameters())
    round_to_int8(rounded.gpt, rounded.sizes, VOCABULARY)
    if not words.equal(before):  # a tied table: generation rounds it for the head alone
        untied.gpt.sequential["0"].word_embeddings.weight.data.copy_(words)
    compare(build_runner(untied), ModuleRunner(rounded), 2e-4)
    assert sum(p.numel() for p in untied.gpt.parameters()) < whole * (0.99 if case == "top p" else 0.5)


@needs_kernels
def test_a_full_cache_is_an_error() -> None:
    runner = build_runner(ready_model({}, MOE))
    state = runner.open(4)
    runner.prefill(state, TOKENS[:4])
    with pytest.raises(CacheError, match="4 \\+ 1 tokens do not fit into a cache of 4 positions"):
        runner.decode([state], [1])
    with pytest.raises(ValueError, match="prefill of no tokens"):
        runner.prefill(state, [])


@needs_kernels
def test_models_that_are_not_served_say_why() -> None:
    expert_choice = ready_model({}, MOE | {"moe_router_type": "expert_choice"}, decoding=Decoding())
    assert "experts that choose among the tokens of a call" in str(reason_against(expert_choice))
    assert type(build_runner(expert_choice)) is ModuleRunner
    for keys in ({"moe_router_type": "recurrent"}, {"moe_router_type": "document_pool", "moe_eval_document_expert_pool": 3}):
        looking = ready_model({}, MOE | keys, decoding=Decoding())
        assert "routers that look at other layers or at the text before the token" in str(reason_against(looking))
        assert type(build_runner(looking)) is ModuleRunner
    scaled = ready_model({"norm": "scalenorm"}, {}, decoding=Decoding())
    assert "a norm of the kind ScaleNorm" in str(reason_against(scaled))
    half = ready_model({}, {}, torch.float16, decoding=Decoding())
    assert "weights in float16 on cpu" in str(reason_against(half))
    with pytest.raises(InferenceError, match=r"inference_weights: int8 needs the compiled decoder, and it cannot run: .*float16"):
        build_runner(ready_model({}, {}, torch.float16, decoding=Decoding(weights="int8")))
    with pytest.raises(KernelUnavailable, match=r"kernel_backends: \{decode: compiled\} cannot run: .*float16.*Remove it, or write decode: auto"):
        build_runner(ready_model({}, {}, torch.float16, decoding=Decoding(backend="compiled")))


def test_the_configuration_can_ask_for_the_models_own_forward() -> None:
    assert type(build_runner(ready_model({}, {}, decoding=Decoding(backend="reference")))) is ModuleRunner


def test_a_decoder_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KernelUnavailable, match="decode: there is no implementation 'fast'"):
        build_runner(ready_model({}, {}, decoding=Decoding(backend="fast")))
