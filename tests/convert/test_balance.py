"""The balance loss of transformers' models and ours by their effect: what each adds to the loss, and to the gradient of every router."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron.checkpoint.names import is_derived
from megatron.config import load_config
from megatron.config.neox import NeoXConfig
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.architectures.balance import COEFFICIENT, JOINT
from megatron.convert.from_huggingface import Import, Imported, import_model
from megatron.convert.opened import open_checkpoint
from megatron.convert.to_huggingface import Exported
from megatron.data.progress import build_reporter
from megatron.model import GPT, build_model
from megatron.model.moe.layer import MoELayer
from tests.convert.models import CASES, EXPERTS, VOCABULARY, config_of, lively_model, save_model, source_of

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "initializer_range": 0.2,
}
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4}),
}
DENSE_BETWEEN = ("qwen2-moe", "qwen3-moe")
"""Families whose layers need not all have experts."""
NUMBERS = (0.001, 0.02, 0.01, 1e-05, 0.1, 1 / 3, 0.0010000000000000002)


class Both(NamedTuple):
    """The same model in transformers and here, in float64."""

    theirs: Any
    ours: GPT
    config: NeoXConfig
    imported: Imported


def tokens() -> torch.Tensor:
    """Every other one is the same, so that loads are uneven."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(12, (3, 40), generator=generator) * torch.randint(2, (3, 40), generator=generator)


def skew(theirs: Any) -> None:
    """Routers of different sharpness, each with favourites of its own."""
    gates = [module.weight for name, module in theirs.named_modules() if name.endswith(".gate")]
    with torch.no_grad():
        for number, weight in enumerate(gates):
            weight.mul_(2.0 + number)
            weight[number % len(weight)].mul_(3.0)


def imported(folder: Path, family: str, coefficient: float, **settings: Any) -> Both:
    name, own = FAMILIES[family]
    torch.manual_seed(11)
    model_class = getattr(transformers, name)
    theirs = model_class(model_class.config_class(**{**SIZES, **own, **settings, COEFFICIENT: coefficient}))
    skew(theirs)
    theirs.save_pretrained(folder / "theirs")
    write_tokenizer(folder / "theirs")
    made = import_model(Import(folder / "theirs", folder / "run", check=False), build_reporter())
    config = load_config([folder / "run" / "config.yml"]).config
    return Both(in_float64(theirs), loaded(folder / "run"), config, made)


def write_tokenizer(folder: Path) -> None:
    """Without one an import would have more to say."""
    Tokenizer(WordLevel({"<|endoftext|>": 0, "word": 1}, "word")).save(str(folder / "tokenizer.json"))


def said(made: Imported) -> tuple[str, ...]:
    """Its notices but the first, which is about the tokenizer."""
    assert made.notices[0].startswith("Documents end with")
    return made.notices[1:]


def in_float64(theirs: Any) -> Any:
    """PyTorch's grouped product knows no float64: the experts go one after the other."""
    theirs.set_experts_implementation("eager")
    return theirs.double().eval()


def loaded(run: Path) -> GPT:
    """A checkpoint, in float64."""
    opened = open_checkpoint(run)
    config = opened.source.config
    gpt = build_model(config.model, config.moe, opened.source.vocabulary, seed=0, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, tensor in gpt.state_dict().items():
            if not is_derived(name):
                tensor.copy_(opened.weights.read(name))
    return gpt


def added_here(gpt: GPT) -> torch.Tensor:
    """What the auxiliary losses add, as GPT adds it."""
    aux_losses_A = gpt(tokens()).aux_losses_A
    return sum(coefficient * loss for coefficient, loss in zip(gpt.coefficients, aux_losses_A, strict=True))


def added_there(model: Any) -> torch.Tensor:
    return model.config.router_aux_loss_coef * model(tokens(), output_router_logits=True).aux_loss


def same_gradients(gpt: GPT, model: Any) -> None:
    ours = [layer.mlp.router.layer.weight for layer in gpt.layers if isinstance(layer.mlp, MoELayer)]
    theirs = [module.weight for name, module in model.named_modules() if name.endswith(".gate")]
    for here, there in zip(torch.autograd.grad(added_here(gpt), ours), torch.autograd.grad(added_there(model), theirs), strict=True):
        assert here.abs().max() > 1e-7
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-9)


SHAPES = [("mixtral", 1, 1), ("mixtral", 1, 3), ("mixtral", 2, 2), ("mixtral", 5, 4)]
SHAPES += [(family, *shape) for family, shape in zip(FAMILIES, ((4, 2), (3, 1), (4, 3), (2, 2)), strict=True)]


@pytest.mark.parametrize(("family", "layers", "top_k"), SHAPES)
def test_an_import_adds_what_transformers_adds(family: str, layers: int, top_k: int, tmp_path: Path) -> None:
    """Routers are skewed, and the layers differ."""
    both = imported(tmp_path, family, 0.02, num_hidden_layers=layers, num_experts_per_tok=top_k)
    there = both.theirs(tokens(), labels=tokens(), output_router_logits=True)
    assert added_here(both.ours).item() == pytest.approx(0.02 * there.aux_loss.item(), rel=1e-6)
    plain = both.theirs(tokens(), labels=tokens(), output_router_logits=False).loss
    assert (there.loss - plain).item() == pytest.approx(added_here(both.ours).item(), abs=2e-6)  # of losses in float32
    out = both.ours(tokens()[:, :-1].contiguous(), labels_BS=tokens()[:, 1:].contiguous())
    without_last = both.theirs(tokens()[:, :-1], output_router_logits=True).aux_loss
    assert (out.loss - out.lm_loss).item() == pytest.approx(0.02 * without_last.item(), rel=1e-6)
    if top_k < 4:
        load_XE = out.report.expert_load_XE.double()
        assert bool((load_XE.max(1).values > 1.2 * load_XE.mean(1)).all()), "the routers are skewed"
        same_gradients(both.ours, both.theirs)


@pytest.mark.parametrize("dense", [{"mlp_only_layers": [0, 2]}, {"decoder_sparse_step": 2, "mlp_only_layers": [1]}])
@pytest.mark.parametrize("family", DENSE_BETWEEN)
def test_dense_layers_do_not_count(family: str, dense: dict[str, Any], tmp_path: Path) -> None:
    both = imported(tmp_path, family, 0.01, num_hidden_layers=5, num_experts_per_tok=2, **dense)
    assert added_here(both.ours).item() == pytest.approx(added_there(both.theirs).item(), rel=1e-6)
    same_gradients(both.ours, both.theirs)


def test_padding_counts_in_neither(tmp_path: Path) -> None:
    """transformers leaves out what the mask hides. A batch here has no padding: the texts alone are the batch that it compares with."""
    both = imported(tmp_path, "mixtral", 0.02, num_hidden_layers=3, num_experts_per_tok=2)
    padded = torch.cat([torch.zeros(3, 7, dtype=torch.int64), tokens()], 1)
    mask = torch.cat([torch.zeros(3, 7), torch.ones(3, 40)], 1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    there = both.theirs(padded, attention_mask=mask, position_ids=positions, output_router_logits=True).aux_loss
    assert added_here(both.ours).item() == pytest.approx(0.02 * there.item(), rel=1e-6)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("case", ["mixtral", "mixtral-top-3-window", "qwen3-moe", "qwen2-moe", "olmoe"])
def test_the_number_comes_back_to_the_last_digit(case: str, number: float) -> None:
    name, keys = CASES[case]
    architecture = ARCHITECTURES[name]
    settings = {**architecture.settings(source_of({**keys, "moe_losses": {JOINT: number}}))}
    assert settings[COEFFICIENT] == number
    there_and_back = {**keys, **architecture.keys({**settings, "hidden_act": "silu"})}
    assert there_and_back["moe_losses"] == {JOINT: number}
    assert (
        architecture.settings(source_of({**keys, "moe_losses": yaml.safe_load(yaml.safe_dump(there_and_back["moe_losses"]))}))[COEFFICIENT] == number
    )


def test_a_coefficient_of_zero_is_no_loss(tmp_path: Path) -> None:
    both = imported(tmp_path, "mixtral", 0.0, num_hidden_layers=2)
    assert (both.config.moe.moe_losses, said(both.imported)) == ({}, ())
    assert ARCHITECTURES["mixtral"].settings(source_of(CASES["mixtral"][1]))[COEFFICIENT] == 0.0


def test_glm_has_no_balance_loss(tmp_path: Path) -> None:
    """Its class in transformers reads no coefficient: one in config.json adds nothing there, and nothing here."""
    name, keys = CASES["glm4-moe"]
    settings = ARCHITECTURES[name].settings(source_of({**keys, "moe_losses": {"load_balance": 0.01}}))
    assert COEFFICIENT not in settings
    config = transformers.Glm4MoeConfig(**settings, router_aux_loss_coef=0.5)
    transformers.Glm4MoeForCausalLM(config).save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs")
    made = import_model(Import(tmp_path / "theirs", tmp_path / "run", check=False), build_reporter())
    assert not load_config([tmp_path / "run" / "config.yml"]).config.moe.moe_losses
    assert said(made) == (
        "config.json has router_aux_loss_coef 0.5. The class of this model in transformers does not read it, so no such loss is added here either.",
    )


def test_what_an_import_says(tmp_path: Path) -> None:
    """transformers adds the loss only where router logits are asked for; training here adds it, and says so."""
    both = imported(tmp_path, "mixtral", 0.02, num_hidden_layers=2)
    assert said(both.imported) == (
        "Training adds the balance loss (router_aux_loss_coef 0.02, here moe_losses: joint_load_balance). transformers adds the same loss, but only "
        "with output_router_logits: true, and this config.json does not have that. To train without the loss, write moe_losses: {}.",
    )
    assert both.config.moe.moe_losses == {JOINT: 0.02}
    assert load_config([tmp_path / "run" / "config.yml"], ["moe_losses={}"]).config.moe.moe_losses == {}
    again = imported(tmp_path / "asked", "olmoe", 0.02, num_hidden_layers=2, num_experts_per_tok=2, output_router_logits=True)
    assert said(again.imported) == ()
    no_balance = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "router_z_loss_coef": 0.001, "output_router_logits": True}
    for number in (0.0, 0.01):
        assert imported(tmp_path / f"zloss{number}", "olmoe", number, **no_balance).imported.notices[1:] == (
            "config.json has router_z_loss_coef 0.001. The class of this model in transformers does not read it, so no such loss is added "
            "here either.",
        )


# ---------------------------------------------------------------- exports


def exported(folder: Path, export: Any, keys: dict[str, Any], *, even: bool = False) -> tuple[GPT, Any, Exported]:
    """(ours, what transformers loads, what was said); `even`: routers that give every expert the same probability."""
    config = config_of(keys)
    gpt = lively_model(config)
    for name, tensor in gpt.state_dict().items():
        if name.endswith("router.layer.weight"):
            tensor.mul_(0.0 if even else 3.0)
    save_model(folder / "run", config, gpt)
    made = export(folder / "run", folder / "theirs", save_tokenizer=False, check=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "theirs", trust_remote_code=True)
    return gpt.double(), in_float64(theirs), made


@pytest.mark.parametrize("case", ["mixtral-top-3-window", "qwen3-moe-normalized", "qwen2-moe", "olmoe"])
def test_an_export_adds_what_we_add(case: str, tmp_path: Path, export: Any) -> None:
    name, keys = CASES[case]
    gpt, theirs, made = exported(tmp_path, export, {**keys, "moe_losses": {JOINT: 0.02}})
    assert made.class_name == ARCHITECTURES[name].class_name
    assert made.notices == ()
    assert added_there(theirs).item() == pytest.approx(added_here(gpt).item(), rel=1e-6)


BY_LAYER: list[tuple[str, dict[str, float]]] = [
    ("mixtral", {"load_balance": 0.01}),
    ("mixtral-top-3-window", {"global_load_balance": 0.02, JOINT: 0.003}),
    ("qwen3-moe", {"sequence_load_balance": 0.01, "load_balance": 0.005}),
    ("qwen2-moe", {"load_balance": 0.01}),
    ("olmoe", {"load_balance": 0.01}),
]


@pytest.mark.parametrize(("case", "losses"), BY_LAYER, ids=str)
def test_balance_by_layer_keeps_its_strength_where_layers_are_alike(case: str, losses: dict[str, float], tmp_path: Path, export: Any) -> None:
    """The one difference that is left, as docs/moe.md says: transformers' loss has no form for uneven layers."""
    _, keys = CASES[case]
    gpt, theirs, made = exported(tmp_path, export, {**keys, "moe_losses": losses}, even=True)
    assert added_there(theirs).item() == pytest.approx(added_here(gpt).item(), rel=1e-6)
    assert len(made.notices) == 1
    assert "The loss has the same strength if all layers use their experts in the same way" in made.notices[0]


@pytest.mark.parametrize("top_k", [1, 3])
def test_balance_by_layer_of_a_single_layer_is_exact(top_k: int, tmp_path: Path, export: Any) -> None:
    keys = {**CASES["mixtral"][1], "num_layers": 1, "moe_top_k": top_k, "moe_losses": {"load_balance": 0.01}}
    gpt, theirs, _ = exported(tmp_path, export, keys)
    assert added_there(theirs).item() == pytest.approx(added_here(gpt).item(), rel=1e-6)


def test_what_an_export_says(tmp_path: Path, export: Any) -> None:
    losses = {"load_balance": 0.01, "z_loss": 0.001, "entropy": 0.0}
    _, theirs, made = exported(tmp_path, export, {**CASES["mixtral"][1], "moe_losses": losses})
    assert theirs.config.router_aux_loss_coef == 0.015
    assert made.notices == (
        "MixtralForCausalLM does not compute z_loss: if you train this export in transformers, these losses are not added.",
        "moe_losses: load_balance 0.01 becomes router_aux_loss_coef 0.015. transformers takes one mean over all layers and counts 2 choices for each "
        "token. The loss has the same strength if all layers use their experts in the same way; otherwise it differs.",
    )
    _, _, made = exported(tmp_path / "glm", export, {**CASES["glm4-moe"][1], "moe_losses": {"sequence_load_balance": 0.01}})
    assert made.notices == (
        "Glm4MoeForCausalLM does not compute sequence_load_balance: if you train this export in transformers, these losses are not added.",
    )


# ---------------------------------------------------------------- our own class

STRUCTMOE = {**EXPERTS, "moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_rank": 8, "moe_layers": [0, 2]}
SEVERAL = {"load_balance": 0.01, JOINT: 0.02, "z_loss": 0.001}


def test_an_export_of_our_own_class_says_what_it_does_not_compute(tmp_path: Path, export: Any) -> None:
    losses = {"load_balance": 0.01, "neighbour_selection": 0.1, "lore_balance": 0.01}
    _, _, made = exported(tmp_path, export, {**STRUCTMOE, "moe_losses": losses})
    assert made.notices == (
        "StructMoEForCausalLM does not compute lore_balance, neighbour_selection: if you train this export in transformers, these losses are not "
        "added.",
    )


@pytest.mark.parametrize("losses", [{JOINT: 0.02}, SEVERAL, {"z_loss": 0.003, JOINT: 0.1}], ids=str)
def test_our_own_class_adds_what_we_add(losses: dict[str, float], tmp_path: Path, export: Any) -> None:
    gpt, theirs, made = exported(tmp_path, export, {**STRUCTMOE, "moe_losses": losses})
    assert (made.class_name, made.notices) == ("StructMoEForCausalLM", ())
    assert added_there(theirs).item() == pytest.approx(added_here(gpt).item(), rel=1e-6)


def test_a_coefficient_that_was_changed_in_the_export_is_changed_here(tmp_path: Path, export: Any) -> None:
    _, theirs, _ = exported(tmp_path, export, {**STRUCTMOE, "moe_losses": SEVERAL})
    file = tmp_path / "theirs" / "config.json"
    for factor, wanted in ((1.0, SEVERAL), (4.0, {name: 4 * number for name, number in SEVERAL.items()}), (0.0, dict.fromkeys(SEVERAL, 0.0))):
        file.write_text(json.dumps({**json.loads(file.read_text()), COEFFICIENT: 0.01 * factor}))
        import_model(Import(tmp_path / "theirs", tmp_path / f"run{factor}", check=False), build_reporter())
        config = load_config([tmp_path / f"run{factor}" / "config.yml"]).config
        assert config.moe.moe_losses == pytest.approx(wanted, rel=1e-15)
        theirs.config.router_aux_loss_coef = 0.01 * factor
        ours = loaded(tmp_path / f"run{factor}")
        assert added_here(ours).item() == pytest.approx(added_there(theirs).item(), rel=1e-6)
