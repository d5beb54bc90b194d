"""StructMoEForCausalLM does what transformers' own models do: caches, generation, padding, losses, checkpointing, outputs."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron.convert.huggingface import experts_structmoe
from megatron.convert.huggingface.attention_structmoe import rotary_frequencies
from megatron.convert.huggingface.configuration_structmoe import StructMoEConfig
from megatron.convert.huggingface.losses_structmoe import JOINT, LOSSES
from megatron.convert.huggingface.modeling_structmoe import StructMoEForCausalLM, StructMoEModel
from tests.convert.structmoe_cases import CASES, MOE, SIGMOID
from tests.convert.structmoe_model import VOCAB, pair, tokens

TOLERANCE = {"rtol": 0.0, "atol": 3e-5}
# Each way of knowing positions, and each way of sending tokens to experts that does not look at other tokens.
GENERATING = [
    "rotary half",
    "rotary llama3",
    "qk all heads layernorm gqa",
    "learned offset",
    "sinusoidal",
    "alibi six heads",
    "rpe scaled in some layers",
    "no positions",
    "window",
    "window alibi",
    "window rpe gqa",
    "structmoe swiglu both",
    "sigmoid groups",
    "top_p",
    "quantile balancing",
    "expert threshold",
    "document pool",
    "recurrent behind a dense layer",
    "residual and shared",
    "parallel experts",
    "wide heads qk per head",
    "narrow heads gqa",
    "heads that do not divide",
]


def model_of(name: str, **options: Any) -> StructMoEForCausalLM:
    return pair(**options, **CASES[name]).theirs


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    """Greedily; and both take the tokens that our own model finds most probable."""
    _, gpt, _, model = pair(**CASES[name])
    prompt = tokens(2, 12)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    with torch.no_grad():
        best = gpt(cached).logits_BSV[:, 11:-1].argmax(-1)
    assert torch.equal(cached[:, 12:], best)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 10}, {"num_beams": 2, "do_sample": True}], ids=str)
def test_beams_and_samples_are_the_same_with_and_without_a_cache(options: dict[str, Any]) -> None:
    model, prompt = model_of("structmoe swiglu both"), tokens(2, 6)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(model.generate(prompt, max_new_tokens=8, use_cache=use_cache, pad_token_id=0, **options))
    assert torch.equal(*results)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GENERATING)
def test_padding_on_the_left_changes_nothing(name: str, attention: str) -> None:
    model = model_of(name, attention=attention)
    prompt = tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), prompt], dim=1)
    batch, mask = torch.cat([padded, tokens(1, 13, seed=1)]), torch.ones(2, 13, dtype=torch.int64)
    mask[0, :4] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(prompt, **options)
    together = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[0, 4:], alone[0])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(batch, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(logits[:1, 4:], model(prompt).logits, **TOLERANCE)
    assert bool(logits.isfinite().all())


def test_padding_on_the_right_changes_nothing() -> None:
    """As lm-eval pads."""
    model, text = model_of("structmoe"), tokens(1, 9)
    padded = torch.cat([text, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded).logits[:, :9], model(text).logits, **TOLERANCE)


def test_several_texts_in_one_row_are_kept_apart_by_their_positions() -> None:
    model, (first, second) = model_of("structmoe"), (tokens(1, 7), tokens(1, 9, seed=1))
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, :7], model(first).logits, **TOLERANCE)
        torch.testing.assert_close(packed[:, 7:], model(second).logits, **TOLERANCE)


def test_a_prompt_in_pieces_and_a_static_cache() -> None:
    for name in ("window alibi", "rpe scaled in some layers", "structmoe"):
        model, text = model_of(name), tokens(2, 15)
        with torch.no_grad():
            first = model(text[:, :9])
            second = model(text[:, 9:], past_key_values=first.past_key_values)
            torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), model(text).logits, **TOLERANCE)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        static = model.generate(text, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(static, model.generate(text, **options)), name


def test_only_the_logits_that_are_asked_for() -> None:
    model = model_of("structmoe")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(), logits_to_keep=2).logits, model(tokens()).logits[:, -2:])


# ---------------------------------------------------------------- losses and gradients


def test_the_loss_of_labels_is_the_mean_over_next_tokens() -> None:
    _, gpt, _, model = pair(**CASES["structmoe"])
    text = tokens(2, 17)
    ours = gpt(text[:, :-1], labels_BS=text[:, 1:]).lm_loss
    torch.testing.assert_close(model(text, labels=text).loss, ours)
    assert model(text, labels=text).aux_loss is None


def test_micro_batches_of_unequal_labels_give_the_loss_of_the_whole() -> None:
    """As transformers' Trainer accumulates: each loss is told how many labels there are in all, and the losses are added up."""
    model = model_of("structmoe", moe_losses={"z_loss": 0.1}).train()
    text = tokens(2, 17)
    labels = torch.where(torch.arange(17) < torch.tensor([[15], [4]]), text, -100)
    number = (labels[:, 1:] >= 0).sum()
    parts = [model(text[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=number) for i in range(2)]
    whole = model(text, labels=labels)
    coefficient = model.config.router_aux_loss_coef
    lm_loss = sum(part.loss - coefficient * part.aux_loss * count / number for part, count in zip(parts, (14, 3), strict=True))
    torch.testing.assert_close(lm_loss, whole.loss - coefficient * whole.aux_loss)
    auxiliary = sum(part.aux_loss * count for part, count in zip(parts, (14, 3), strict=True)) / number
    torch.testing.assert_close(sum(part.loss for part in parts), lm_loss + coefficient * auxiliary)
    assert "kwargs" in inspect.signature(model.forward).parameters, "what Trainer looks for"


ALL_LOSSES = {
    "load_balance": 0.3,
    "sequence_load_balance": 0.5,
    "global_load_balance": 0.1,
    "heterogeneous_load_balance": 0.4,
    "joint_load_balance": 0.7,
    "z_loss": 0.01,
    "entropy": 0.2,
    "block_wise_selection": 2.0,
}
ROUTINGS = {"topk": MOE, "sigmoid": SIGMOID, "top_p": {**MOE, "moe_router_type": "top_p"}, "sinkhorn 1": CASES["sinkhorn 1"]}


@pytest.mark.parametrize("router", ROUTINGS)
def test_auxiliary_losses_are_ours(router: str) -> None:
    """Each alone, and all with their coefficients as `aux_loss` and in the loss."""
    assert ALL_LOSSES.keys() == {*LOSSES, JOINT}
    _, gpt, _, model = pair(**{**ROUTINGS[router], "moe_losses": ALL_LOSSES, "moe_block_wise_temperature": 0.5})
    expected_A = gpt(tokens()).aux_losses_A
    for name, value in zip(ALL_LOSSES, expected_A, strict=True):
        model.config.moe_losses = {name: 1.0}
        torch.testing.assert_close(model(tokens(), output_router_logits=True).aux_loss, value)
    model.config.moe_losses = dict(ALL_LOSSES)
    output = model(tokens(), labels=tokens(), output_router_logits=True)
    weighted = (torch.tensor(list(ALL_LOSSES.values())) * expected_A).sum()
    torch.testing.assert_close(output.aux_loss, weighted / ALL_LOSSES["load_balance"])
    torch.testing.assert_close(output.loss, model(tokens(), labels=tokens()).loss + weighted)


def test_auxiliary_losses_do_not_see_padding() -> None:
    _, _, _, model = pair(**{**MOE, "moe_losses": ALL_LOSSES})
    text = tokens(1, 11)
    alone = model(text, output_router_logits=True).aux_loss
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), text], dim=1)
    mask = torch.cat([torch.zeros(1, 6), torch.ones(1, 11)], dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(padded, attention_mask=mask, position_ids=positions, output_router_logits=True).aux_loss
    torch.testing.assert_close(together, alone)


def test_auxiliary_losses_are_in_the_loss_of_training() -> None:
    """Without being asked for; times `router_aux_loss_coef`."""
    _, _, _, model = pair(**{**MOE, "moe_losses": {"load_balance": 0.3}})
    plain = model(tokens(), labels=tokens()).loss
    model.train()
    model.config.router_aux_loss_coef = 2.0
    output = model(tokens(), labels=tokens())
    assert output.router_logits is None
    torch.testing.assert_close(output.loss, plain + 2 * output.aux_loss)
    output.aux_loss.backward()
    assert bool(model.model.layers[0].mlp.gate.weight.grad.any())


@pytest.mark.parametrize(
    ("losses", "coefficient"),
    [
        ({}, 0.0),
        ({"load_balance": 0.01, "z_loss": 0.001}, 0.01),
        ({"z_loss": 0.001}, 0.001),
        ({"load_balance": 0.0}, 1.0),
        ({"z_loss": 0.1, "joint_load_balance": 0.02}, 0.02),
    ],
)
def test_trainers_find_the_coefficient_and_the_number_of_experts(losses: dict[str, float], coefficient: float) -> None:
    """TRL reads both, and adds load balance times the coefficient by itself."""
    _, _, _, model = pair(**{**MOE, "moe_losses": losses, "moe_layers": [1]})
    assert (model.config.router_aux_loss_coef, model.config.num_experts) == (coefficient, 4)


def gradients(model: StructMoEForCausalLM) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["structmoe swiglu both", "residual and shared", "decomposed gated", "structmoe standalone", "sigmoid"])
def test_gradients_are_ours(name: str) -> None:
    """Of everything that has one; through the table, so that the form of every weight is in it."""
    from megatron.convert.architectures.structmoe import StructMoE
    from megatron.convert.mapping import to_ours

    source, gpt, _, model = pair(**CASES[name])
    text = tokens(2, 33)
    gpt(text[:, :-1], labels_BS=text[:, 1:]).lm_loss.backward()
    model(text, labels=text).loss.backward()
    theirs = {key: parameter.grad for key, parameter in model.named_parameters()} | dict(model.named_buffers())
    back = {named.name: named.tensor for named in to_ours(StructMoE().table(source), theirs.__getitem__)}
    for key, parameter in gpt.named_parameters():
        torch.testing.assert_close(back[key], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["structmoe swiglu both", "rpe scaled in some layers", "tied residual experts"])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    _, _, _, model = pair(**{**CASES[name], "moe_losses": {"z_loss": 0.1}})
    model.train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients(model)
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["structmoe swiglu both", "decomposed", "structmoe unrouted", "top_p"])
def test_the_grouped_kernel_is_the_loop_over_experts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    calls = []
    kernel = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **options: calls.append(1) or kernel(*args, **options))
    expected, expected_gradients = model(tokens()).logits, gradients(model)
    assert calls, "these sizes should take the kernel"
    monkeypatch.setattr(experts_structmoe, "fits_grouped_mm", lambda weight: False)
    before = len(calls)
    torch.testing.assert_close(model(tokens()).logits, expected, **TOLERANCE)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-4, atol=1e-5)
    assert len(calls) == before


def test_every_product_takes_the_kernel_at_sizes_of_practice() -> None:
    """The fast path has no loop over experts."""
    for dtype in (torch.float32, torch.bfloat16):
        assert experts_structmoe.fits_grouped_mm(torch.empty(2, 64, 128, dtype=dtype))
        assert not experts_structmoe.fits_grouped_mm(torch.empty(2, 64, 129, dtype=dtype))
    assert not experts_structmoe.fits_grouped_mm(torch.empty(2, 64, 128, dtype=torch.float64))


# ---------------------------------------------------------------- number formats


def test_routers_compute_in_float32_whatever_the_rest_does() -> None:
    model = model_of("structmoe swiglu both")
    with torch.no_grad():
        exact = model(tokens(), output_router_logits=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(tokens(), output_router_logits=True)
        half = copy.deepcopy(model).to(torch.bfloat16)(tokens(), output_router_logits=True)
    assert mixed.router_logits[0].dtype == half.router_logits[0].dtype == torch.float32
    for other in (mixed, half):
        assert (other.logits.float() - exact.logits).abs().mean() < 0.25
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_products_follow_automatic_casts() -> None:
    x, weight, ends = torch.randn(3, 8), torch.randn(2, 8, 8), torch.tensor([1, 3], dtype=torch.int32)
    assert experts_structmoe.grouped_mm(x, weight, ends).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert experts_structmoe.grouped_mm(x, weight, ends).dtype == torch.bfloat16


def test_what_balances_routers_is_loaded_in_float32_whatever_is_asked_for() -> None:
    exact = ("e_score_correction_bias", "e_score_threshold", "threshold_steps")
    assert model_of("sigmoid")._get_dtype_plan(torch.bfloat16) == dict.fromkeys(exact, torch.float32)


def test_what_the_attention_interface_is_given() -> None:
    """Flash attention reads the window and the positions from its arguments, not from a mask."""
    given: dict[str, Any] = {}

    def probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
        given.update(options, shapes=[tuple(part.shape) for part in (query, key, value)], causal=module.is_causal)
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("probe of structmoe", probe)
    _, _, _, model = pair(**{**CASES["window rpe gqa"], "pos_emb": "rotary", "attention_dropout": 0.1})
    model.set_attn_implementation("probe of structmoe")
    model.train()(tokens())
    assert given.pop("shapes") == [(2, 4, 64, 8), (2, 2, 64, 8), (2, 2, 64, 8)]
    assert torch.equal(given.pop("position_ids"), torch.arange(64)[None])
    assert given == {"scaling": 8**-0.5, "dropout": 0.1, "sliding_window": 10, "causal": True}


# ---------------------------------------------------------------- outputs and surgery


def test_hidden_states_attentions_and_tuples() -> None:
    model = model_of("first dense", attention="eager")
    output = model(tokens(), output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 64, 32)] * 4
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 64, 64)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 64))
    assert [tuple(logits.shape) for logits in output.router_logits] == [(128, 4)] * 2
    assert torch.equal(model(tokens(), return_dict=False)[0], output.logits)
    assert model(tokens()).hidden_states is None
    assert model(inputs_embeds=model.get_input_embeddings()(tokens())).logits.equal(output.logits)


@pytest.mark.parametrize("name", ["structmoe", "tied head"])
def test_a_larger_vocabulary(name: str) -> None:
    model = model_of(name)
    before = model(tokens()).logits
    model.resize_token_embeddings(VOCAB + 8)
    after = model(tokens()).logits
    assert after.shape[-1] == model.config.vocab_size == VOCAB + 8
    torch.testing.assert_close(after[..., :VOCAB], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied head")


@pytest.mark.parametrize("name", ["structmoe swiglu both", "sigmoid", "scalenorm", "rpe", "learned", "decomposed gated", "shared gated"])
def test_fresh_weights(name: str) -> None:
    """All are drawn, norms are 1 and biases 0."""
    config = model_of(name).config
    torch.manual_seed(0)
    model = StructMoEForCausalLM(config)
    for key, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith("bias"):
            assert not parameter.any(), key
        elif "norm" in key:
            assert bool((parameter == 1).all()), key
        else:
            assert 0.7 < parameter.std() / config.initializer_range < 1.3, key


def test_dropout_and_jitter_act_in_training_alone() -> None:
    _, _, _, model = pair(**{**MOE, "attention_dropout": 0.1, "hidden_dropout": 0.1, "moe_jitter_eps": 0.1})
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, model(tokens()).logits)
        model.train()
        assert not torch.allclose(model(tokens()).logits, model(tokens()).logits)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_dropout = 0.0
        assert not torch.allclose(model(tokens()).logits, model(tokens()).logits)


def test_dropout_of_the_residual_stream_stands_where_gpt_neox_has_it() -> None:
    """After attention and MLPs with biases, not after others and experts."""
    places = {"dense": {}, "no biases": {"use_bias_in_mlp": False}, "experts": MOE}
    layers = {name: pair(**{**changes, "hidden_dropout": 0.1}).theirs.model.layers[0] for name, changes in places.items()}
    assert {name: (layer.dropout.p, layer.mlp_dropout.p) for name, layer in layers.items()} == {
        "dense": (0.1, 0.1),
        "no biases": (0.1, 0.0),
        "experts": (0.1, 0.0),
    }


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(kind: str) -> None:
    model = model_of("rotary half")
    model.config.rotary_scaling = SCALINGS[kind]
    settings = {"rope_parameters": {**SCALINGS[kind], "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
    llama = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=96, **settings)
    theirs, _ = ROPE_INIT_FUNCTIONS[kind](llama, "cpu")
    torch.testing.assert_close(torch.tensor(rotary_frequencies(model.config)), theirs)
    assert not torch.allclose(model(tokens()).logits, model_of("rotary half")(tokens()).logits, atol=1e-2)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_one_norm_for_all_heads_repeats_grouped_keys_and_values(norm: str) -> None:
    """A model with grouped heads is the model without, its keys and values standing as often; cached generation included."""
    whole = model_of(f"qk all heads {norm}")
    grouped = StructMoEForCausalLM(StructMoEConfig(**{**whole.config.to_dict(), "num_key_value_heads": 2})).eval()
    state = whole.state_dict()
    first_of_two = {key: tensor.unflatten(0, (4, 8))[::2] for key, tensor in state.items() if "k_proj" in key or "v_proj" in key}
    grouped.load_state_dict(state | {key: heads.flatten(0, 1) for key, heads in first_of_two.items()})
    whole.load_state_dict(state | {key: heads.repeat_interleave(2, 0).flatten(0, 1) for key, heads in first_of_two.items()})
    torch.testing.assert_close(grouped(tokens()).logits, whole(tokens()).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(grouped.generate(tokens(2, 5), **options), whole.generate(tokens(2, 5), **options))


def test_expert_choice_looks_at_the_whole_batch() -> None:
    """Why generation with a cache is not compared for it: another text beside it changes what a text gets."""
    model = model_of("expert choice")
    with torch.no_grad():
        assert not torch.allclose(model(tokens()[:1]).logits, model(tokens()).logits[:1], atol=1e-3)


def test_low_rank_adapters() -> None:
    """With PEFT, on the projections of attention and MLPs by their names."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = model_of("shared gated")
    before = model(tokens()).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]))
    torch.testing.assert_close(wrapped(tokens()).logits, before)
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    assert wrapped.generate(input_ids=tokens(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_type": "random"}, "router_type = 'random': must be one of topk, sinkhorn, sigmoid, top_p, expert_choice"),
        ({"num_hidden_layers": 3, "num_experts_by_layer": [4]}, "num_experts_by_layer has 1 entries: must have one for each of the 3 layers"),
        ({"num_hidden_layers": 3, "position_bias_scale": [1.0]}, "position_bias_scale has 1 entries: must have one for each of the 3 layers"),
    ],
)
def test_a_configuration_that_means_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructMoEConfig(**settings)


def test_inputs_that_mean_nothing() -> None:
    model = model_of("alibi")
    for inputs in ({}, {"input_ids": tokens(), "inputs_embeds": torch.zeros(2, 64, 32)}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds, not both"):
            model(**inputs)
    model.config._attn_implementation_internal = "flash_attention_2"
    message = "attn_implementation = 'flash_attention_2' cannot add the position biases of position_type 'alibi'; use 'sdpa' or 'eager'"
    with pytest.raises(ValueError, match=message):
        model(tokens())


def test_the_model_without_a_head() -> None:
    model = model_of("structmoe")
    bare = StructMoEModel(model.config).eval()
    bare.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.lm_head(bare(tokens()).last_hidden_state), model(tokens()).logits)
    assert model.base_model is model.model
