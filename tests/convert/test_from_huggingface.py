"""Imports: a real Llama keeps its text and its loss, any layout on disk, upcycling to experts, and sentences for what cannot be read."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from megatron.checkpoint.weights import load_model_weights
from megatron.config import load_config
from megatron.convert.to_huggingface import Exported
from megatron.inference.model import load_ready_model
from tests.convert.models import CASES, VOCABULARY, source_of
from tests.training.runs import train_losses

SIGMOID = {"moe_router_type": "sigmoid"}
BY_LAYER = {"moe_num_experts_by_layer": [2, 4, 8, 4, 2]}
STORY = "Once upon a time, there was a little girl named"
EXPERTS = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk", "moe_normalize_top_k": True}
LORES = {"moe_expert_type": "structmoe", "moe_num_lores": 4, "moe_lore_rank": 8}


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    """tools/ckpts/convert_hf_to_neox.py."""
    module = tool("tools/ckpts/convert_hf_to_neox.py")
    return lambda *words: int(module.main([str(word) for word in words]))


@pytest.fixture(scope="session")
def stories(shared_dir: Path) -> Path:
    """A Llama of 260 thousand parameters, trained on TinyStories."""
    return shared_dir / "data" / "models" / "stories260K" / "hf"


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, saved by transformers."""
    directory = tmp_path_factory.mktemp("theirs")
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**settings, intermediate_size=48, max_position_embeddings=64, initializer_range=0.3)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def ours(directory: Path) -> Any:
    """What generate.py and eval.py would load."""
    return load_ready_model(load_config([directory / "config.yml"]).config)


def test_a_trained_llama_keeps_its_loss_and_its_text(stories: Path, shared_dir: Path, main: Callable[..., int], tmp_path: Path, export: Any) -> None:
    """1.70 nats per token on the first 511 tokens of TinyStories after <s>."""
    assert main("--model_path", stories, "--output_dir", tmp_path / "run", "--tp", 2, "--pp", 1) == 0
    export(tmp_path / "run", tmp_path / "back")
    before, after = (load_file(directory / "model.safetensors") for directory in (stories, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    ready = ours(tmp_path / "run")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    text = (shared_dir / "data" / "text" / "tinystories_exllamav3.txt").read_text()[:12_000]
    ids = tokenizer.encode(text, add_special_tokens=False)
    windows = torch.tensor([[tokenizer.bos_token_id, *ids[begin : begin + 511]] for begin in range(0, len(ids) - 511, 511)])
    with torch.no_grad():
        logits = ready.gpt(windows).logits_BSV
        difference = (logits - hf(windows).logits).abs()
    assert difference[:, :64].max() < 1e-4
    assert difference.max() < 1e-3  # transformers rounds the angles of late positions to float32
    assert torch.nn.functional.cross_entropy(logits[0, :-1], windows[0, 1:]).item() == pytest.approx(1.70, abs=0.03)

    prompt = torch.tensor([tokenizer.encode(STORY)])
    generated = hf.generate(prompt, max_new_tokens=40, do_sample=False)
    original = transformers.AutoModelForCausalLM.from_pretrained(stories).generate(prompt, max_new_tokens=40, do_sample=False)
    assert torch.equal(generated, original)
    greedy = prompt
    for _ in range(40):
        with torch.no_grad():
            greedy = torch.cat([greedy, ready.gpt(greedy).logits_BSV[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, original)


@pytest.mark.parametrize(("tp", "pp"), [(1, 0), (2, 0), (2, 1), (2, 3)])
def test_every_layout_holds_the_same_weights(tp: int, pp: int, theirs: Path, main: Callable[..., int], tmp_path: Path) -> None:
    assert main("--model_path", theirs, "--output_dir", tmp_path / "run", "--tp", tp, "--pp", pp) == 0
    names = sorted(file.name for file in (tmp_path / "run" / "global_step0").glob("*.pt"))
    assert sum(name.startswith("mp_rank") for name in names) == tp * max(1, pp)
    assert sum(name.startswith("layer") for name in names) == (tp * 5 if pp else 0)
    stored = load_file(theirs / "model.safetensors")
    loaded = load_model_weights(tmp_path / "run").state_dict
    gate, up = (stored[f"model.layers.1.mlp.{which}_proj.weight"] for which in ("gate", "up"))
    assert torch.equal(loaded["sequential.3.mlp.linear1.weight"], torch.cat([up, gate]))
    assert torch.equal(loaded["sequential.6.final_linear.weight"], stored["lm_head.weight"])


def test_training_goes_on_from_an_import(main: Callable[..., int], tmp_path: Path, corpus: Path) -> None:
    """`finetune` starts at step 0 with the imported weights, whichever layout they lie in."""
    settings = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(**settings, max_position_embeddings=32, initializer_range=0.3)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    how = {"train_iters": 2, "train_micro_batch_size_per_gpu": 2, "log_interval": 1, "seq_length": 16, "num_workers": 0, "checkpoint_factor": 9}
    how |= {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "data_path": str(corpus), "split": "1,0,0", "eval_interval": 100}
    losses = []
    for number, layout in enumerate(([], ["--tp", 2, "--pp", 1])):
        assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / f"run{number}", *layout) == 0
        keys = yaml.safe_load((tmp_path / f"run{number}" / "config.yml").read_text())
        losses.append(train_losses({**keys, **how, "save": str(tmp_path / f"save{number}")}))
    fresh = {key: value for key, value in keys.items() if key not in ("load", "finetune")}
    from_scratch = train_losses({**fresh, **how, "save": str(tmp_path / "fresh")})
    assert losses[0] == losses[1]
    assert abs(losses[0][0] - from_scratch[0]) > 0.01


def write_keys(path: Path, keys: dict[str, Any]) -> Path:
    path.write_text(json.dumps(keys))
    return path


@pytest.mark.parametrize(
    "extra", [{}, LORES, {**LORES, "moe_lore_interaction": "standalone"}, {"moe_expert_interval": 2, "moe_top_k": 1}, SIGMOID, BY_LAYER]
)
def test_upcycling_changes_no_logit(extra: dict[str, Any], stories: Path, main: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    keys = {**EXPERTS, **extra}
    if extra is BY_LAYER:
        del keys["moe_num_experts"]
    moe = write_keys(tmp_path / "moe.yml", keys)
    assert main("--model_path", stories, "--output_dir", tmp_path / "run", "--upcycle", moe) == 0
    assert "Compared with the dense model: largest difference of a logit" in capsys.readouterr().out
    ready = ours(tmp_path / "run")
    assert any(name.endswith(".experts.mlp.w3") for name in ready.gpt.state_dict())
    tokens = torch.randint(512, (1, 100), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(stories)(tokens).logits
        assert (ready.gpt(tokens).logits_BSV - expected).abs().max() < 1e-4


def test_weights_that_do_not_sum_to_one_are_said(stories: Path, main: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    moe = write_keys(tmp_path / "moe.yml", {**EXPERTS, "moe_normalize_top_k": False})
    assert main("--model_path", stories, "--output_dir", tmp_path / "run", "--upcycle", moe) == 0
    assert "The weights of a token's experts do not sum to 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "--upcycle: moe_num_experts must be 2 or more."),
        (
            {**EXPERTS, "moe_expert_type": "decomposed"},
            "--upcycle: moe_expert_type decomposed: its matrices are products of low-rank matrices, and those of an MLP are not.",
        ),
        ({**EXPERTS, "moe_ffn_hidden_size": 64}, "--upcycle: an expert must be as wide as the MLP: set moe_ffn_hidden_size to 48."),
        ({**EXPERTS, "moe_top_k": 9}, "'moe_top_k' = 9: must be at most moe_num_experts (4)"),
        ({**EXPERTS, "hidden_size": 64}, "--upcycle: hidden_size is not a key of experts (moe_...). "),
        ({**EXPERTS, "moe_rooter_type": "topk"}, "unknown key 'moe_rooter_type'"),
    ],
)
def test_what_cannot_be_upcycled_is_a_sentence(
    keys: dict[str, Any], sentence: str, theirs: Path, main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--model_path", theirs, "--output_dir", tmp_path / "run", "--upcycle", write_keys(tmp_path / "moe.yml", keys)) > 0
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut_short(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 20_000)


def lose_shard(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_norm(directory: Path, norm: torch.Tensor) -> None:
    save_file({**load_file(directory / "model.safetensors"), "model.norm.weight": norm}, directory / "model.safetensors")


def write_old(directory: Path, content: object) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")


def large_tokenizer(directory: Path) -> None:
    words = {f"word{number}": number for number in range(VOCABULARY + 1)}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": words, "unk_token": "word0"}}))


def add_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file({**weights, "model.layers.0.adapter.weight": torch.ones(2)}, directory / "model.safetensors")


def lose_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (cut_short, "model.safetensors is damaged: "),
        (lose_shard, "model-00001-of-00002.safetensors is missing: model.safetensors.index.json names it."),
        (add_weight, "holds model.layers.0.adapter.weight, but this model has no such weight (1 weights of this kind)."),
        (lose_weight, "holds no weight model.layers.1.self_attn.k_proj.weight."),
        (lambda directory: (directory / "model.safetensors").unlink(), "holds no weights: there is no model.safetensors, no pytorch_model.bin"),
        (lambda directory: (directory / "config.json").unlink(), "config.json is missing"),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json is damaged: its model_type cannot be read"),
        (lambda directory: change_config(directory, model_type="bert"), "model_type bert cannot be read; known are glm4_moe, gpt_neox, "),
        (lambda directory: change_config(directory, model_type="nothing"), "model_type nothing cannot be read; known are glm4_moe, gpt_neox, "),
        (lambda directory: change_config(directory, model_type=["llama"]), "config.json: model_type is ['llama'], which is not a name."),
        (lambda directory: change_config(directory, hidden_size="big"), "config.json is refused by transformers: Validation error for field 'hidden"),
        (lambda directory: change_config(directory, num_attention_heads=0), "config.json is refused by transformers: integer modulo by zero."),
        (lambda directory: change_config(directory, num_hidden_layers=10**9), "says num_hidden_layers 1000000000, but the directory holds only 21 w"),
        (
            lambda directory: change_config(directory, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": "a"}),
            "config.json: a setting is missing or is not a number (invalid literal for int() with base 10: 'a').",
        ),
        (lambda directory: change_config(directory, quantization_config={"quant_method": "gptq"}), "holds quantized weights (quantization_config)"),
        (lambda directory: change_norm(directory, torch.full((32,), math.nan)), "norm.scale holds 32 numbers that are NaN or infinite"),
        (
            lambda directory: change_norm(directory, torch.ones(32, dtype=torch.int64)),
            "norm.scale holds int64 numbers, but weights must be floating-point num",
        ),
        (lambda directory: write_index(directory, None), "index.json is damaged: it does not say which file holds which weight"),
        (lambda directory: write_index(directory, {"a": 1}), "1 is missing: model.safetensors.index.json names it."),
        (lambda directory: write_old(directory, {"a": 1}), "pytorch_model.bin does not hold a dictionary of weights."),
        (
            large_tokenizer,
            "its tokenizer has 97 entries, but the model has 96 rows; 1 of the tokenizer's entries ('word96') have no row. Add --extra-tok",
        ),
        (
            lambda directory: change_config(directory, head_dim=16),
            "query_key_value.weight has the shape [64, 32], but the configuration needs [128, 32]",
        ),
        (lambda directory: change_config(directory, head_dim=7), "RoPE requires an even rotary dimension, but got `head_dim`=7"),
        (lambda directory: change_config(directory, hidden_act="tanh"), "hidden_act: tanh cannot be represented; known are gelu, "),
        (
            lambda directory: change_config(directory, intermediate_size=40),
            "mlp.linear1.weight has the shape [96, 32], but the configuration needs [80, 32]",
        ),
        (
            lambda directory: change_config(directory, vocab_size=64),
            "word_embeddings.weight has the shape [96, 32], but the configuration needs [64, 32]",
        ),
        (lambda directory: change_config(directory, num_key_value_heads=4), "k_proj.weight and model.layers.0.self_attn.v_proj.weight of shape"),
        (lambda directory: change_config(directory, num_hidden_layers=1), "but this model has no such weight (9 weights of this kind)"),
        (
            lambda directory: change_config(directory, rope_parameters={"rope_type": "default", "rope_theta": 10000.5}),
            "rope_theta: 10000.5 cannot be represented",
        ),
    ],
)
def test_what_cannot_be_read_is_a_sentence_and_leaves_nothing(
    spoil: Callable[[Path], Any], sentence: str, theirs: Path, main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(theirs, tmp_path / "theirs")
    spoil(tmp_path / "theirs")
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("forced", [[], ["--force"]])
def test_a_failed_import_leaves_a_directory_as_it_was(forced: list[str], theirs: Path, main: Callable[..., int], tmp_path: Path) -> None:
    shutil.copytree(theirs, tmp_path / "theirs")
    change_norm(tmp_path / "theirs", torch.full((32,), math.nan))
    (tmp_path / "run").mkdir()
    if forced:
        (tmp_path / "run" / "notes.txt").write_text("mine")
    before = list((tmp_path / "run").iterdir())
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run", *forced) == 1
    assert list((tmp_path / "run").iterdir()) == before
    assert main("--model_path", theirs, "--output_dir", tmp_path / "run", *forced) == 0
    written = {"global_step0", "latest", "config.yml", "token_ids.json", "generation_config.json"}
    assert written | {path.name for path in before} == {path.name for path in (tmp_path / "run").iterdir()}
    assert main("--model_path", theirs, "--output_dir", tmp_path / "run", "--force") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "theirs"]


@pytest.mark.parametrize("held", ["global_step500", "global_step0", "latest", "config.yml"])
def test_an_import_does_not_write_over_a_run(held: str, theirs: Path, main: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    (run / held).mkdir(parents=True) if held.startswith("global") else (run.mkdir(), (run / held).write_text("mine"))
    assert main("--model_path", theirs, "--output_dir", run, "--force", "--skip-check") == 1
    assert (
        f"run holds {held}, which convert_hf_to_neox.py did not write: move it to another place, or choose another --output_dir."
        in capsys.readouterr().err
    )
    assert [entry.name for entry in run.iterdir()] == [held]


def test_an_import_onto_a_full_disk_is_a_sentence(theirs: Path, small_disk: Path | None, main: Callable[..., int], capsys: Any) -> None:
    if small_disk is None:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    (small_disk / "filling").write_bytes(b"x" * 980_000)
    assert main("--model_path", theirs, "--output_dir", small_disk / "run", "--skip-check") == 1
    error = capsys.readouterr().err
    assert f"No space left on device (disk {small_disk}, " in error
    assert "Traceback" not in error
    assert [entry.name for entry in small_disk.iterdir()] == ["filling"]


def test_an_import_is_interrupted_without_a_trace(theirs: Path, main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron.convert.from_huggingface.compare_logits", interrupt)
    assert main("--model_path", theirs, "--output_dir", tmp_path / "run") == 130
    assert list(tmp_path.iterdir()) == []


def test_two_imports_to_the_same_place(theirs: Path, main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hold = "import pathlib, sys; from megatron.convert.staging import staged_run\nwith staged_run(pathlib.Path(sys.argv[1])): print(), input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert main("--model_path", theirs, "--output_dir", tmp_path / "run") == 1
        other.communicate(b"\n")
    assert f"another process is preparing {tmp_path / 'run'} right now" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Mistral"])
def test_an_import_is_exported_as_what_it_was(kind: str, main: Callable[..., int], tmp_path: Path, export: Callable[..., Exported]) -> None:
    """A Qwen2 is a Llama whose outputs have biases of zero, a Mistral without a window is a Llama: they come back under their own names."""
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    settings |= {"max_position_embeddings": 64, "num_key_value_heads": 2}
    extra = {"Qwen2": {}, "Llama": {"attention_bias": True}, "Mistral": {"sliding_window": None}}[kind]
    config = getattr(transformers, f"{kind}Config")(**settings, **extra)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "theirs")
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run") == 0
    assert export(tmp_path / "run", tmp_path / "back", save_tokenizer=False).class_name == f"{kind}ForCausalLM"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_lies_beside_a_tokenizer_is_kept(
    theirs: Path, main: Callable[..., int], tmp_path: Path, tokenizer_file: Path, export: Callable[..., Exported]
) -> None:
    shutil.copytree(theirs, tmp_path / "theirs")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "chat_template.jinja").is_file()
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.5, "do_sample": True}))
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run") == 0
    export(tmp_path / "run", tmp_path / "back")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|endoftext|>")
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["temperature"]) == ([0, 5], 0.5)
    assert "pad_token_id" not in generation, "it was not there before"


@pytest.mark.parametrize("case", ["pythia", "llama-grouped-tied", "mixtral", "glm4-moe"])
def test_files_of_older_transformers(case: str, tmp_path: Path, main: Callable[..., int]) -> None:
    """pytorch_model.bin in parts, and buffers beside the weights."""
    from megatron.convert.architectures import ARCHITECTURES

    name, keys = CASES[case]
    architecture = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(architecture.model_type, **architecture.settings(source_of(keys)))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    prefix = "gpt_neox" if name == "neox" else "model"
    turned = int(config.hidden_size // config.num_attention_heads * config.rope_parameters.get("partial_rotary_factor", 1.0))
    weights[f"{prefix}.layers.0.attention.rotary_emb.inv_freq"] = (
        config.rope_parameters["rope_theta"] ** -(torch.arange(0, turned, 2) / turned)
    ).half()
    if name == "neox":
        weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 80, 80, dtype=torch.uint8).tril()
        weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    parts = [dict(list(weights.items())[half::2]) for half in range(2)]
    for number, part in enumerate(parts):
        torch.save(part, tmp_path / "theirs" / f"pytorch_model-{number}.bin")
    places = {weight: f"pytorch_model-{number}.bin" for number, part in enumerate(parts) for weight in part}
    (tmp_path / "theirs" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run") == 0
    loaded = load_model_weights(tmp_path / "run").state_dict
    assert math.isclose(loaded["sequential.0.word_embeddings.weight"].sum().item(), weights[architecture_embedding(name)].sum().item())


def architecture_embedding(name: str) -> str:
    return "gpt_neox.embed_in.weight" if name == "neox" else "model.embed_tokens.weight"


def test_both_directions_at_half_precision(theirs: Path, main: Callable[..., int], tmp_path: Path, export: Callable[..., Exported]) -> None:
    assert main("--model_path", theirs, "--output_dir", tmp_path / "run", "--precision", "bf16") == 0
    exported = export(tmp_path / "run", tmp_path / "back", save_tokenizer=False)
    assert exported.compared is not None
    stored, back = load_file(theirs / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(stored[name].bfloat16(), back[name]) for name in stored)
