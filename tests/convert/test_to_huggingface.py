"""Exports: the same from every layout on disk, with everything that belongs to them, whole or not there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron.checkpoint.save_weights import Division
from megatron.config.components import ROUTERS
from megatron.convert.choice import choose_architecture
from megatron.convert.errors import ConversionError
from megatron.convert.to_huggingface import Exported
from megatron.convert.tokenizers import save_tokenizer
from megatron.data.tokenizer import build_tokenizer
from megatron.testing.distributed import run_distributed
from tests.convert.models import BASE, DECODER, EXPERTS, config_of, lively_model, save_model, save_stage, source_of

LLAMA = {**DECODER, "num_kv_heads": 2}
Export = Callable[..., Exported]


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    """tools/ckpts/convert_neox_to_hf.py."""
    module = tool("tools/ckpts/convert_neox_to_hf.py")
    return lambda *words: int(module.main([str(word) for word in words]))


@pytest.fixture
def run(tmp_path: Path, tokenizer_file: Path) -> Path:
    """A Llama's run directory."""
    config = config_of({**LLAMA, "tokenizer_type": "HFTokenizer", "vocab_file": str(tokenizer_file)})
    save_model(tmp_path / "run", config, lively_model(config))
    losses = [{"iteration": 1, "train/lm_loss": 3.5, "validation/lm_loss": 9.0}, {"iteration": 2, "train/lm_loss": 2.5, "validation/lm_loss": 2.25}]
    losses += [{"iteration": 4, "train/lm_loss": 1.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in losses) + '{"iter')
    return tmp_path / "run"


def test_the_command(main: Callable[..., int], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--input_dir", run, "--output_dir", tmp_path / "hf", "--pad-token-id", 0) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM, 29,408 parameters" in printed
    assert "Compared with the checkpoint: largest difference of a logit" in printed
    assert "64 tokens of a text and 64 random ones" in printed
    assert len({file.stat().st_mode for file in (tmp_path / "hf").iterdir()}) == 1
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], config["pad_token_id"], config["eos_token_id"]) == (["LlamaForCausalLM"], 0, 0)
    card = (tmp_path / "hf" / "README.md").read_text()
    for line in (
        "| parameters | 29,408 |",
        "| training tokens | 4,096 |",
        "| training loss (nats per token) | 3.0000 |",
        "| validation loss (nats per token) | 2.2500 |",
        "largest difference",
    ):
        assert line in card
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = model.generate(**tokenizer("our fathers", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(text[0]).startswith("our fathers")


def test_transformers_does_not_warn_of_our_own_class(run: Path, tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the tokenizer alone, it says that the model "is otherwise not supported", which alarms and is not so."""
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    logging.getLogger("transformers").addHandler(handler)
    try:
        export(run, tmp_path / "hf", architecture="structmoe")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert said == []


WIDE_HEADS = {**DECODER, "num_kv_heads": 2, "head_dim": 24, "add_qkv_bias": True}
CUT = {"llama": LLAMA, "pythia": {**BASE, "gpt_j_residual": True}, "moe": {**EXPERTS, "moe_normalize_top_k": True}, "wide heads": WIDE_HEADS}


@pytest.mark.parametrize("keys", CUT.values(), ids=CUT)
def test_tensor_parallel_and_pipeline_files_merge_to_the_same_bytes(keys: dict[str, Any], tmp_path: Path, export: Export) -> None:
    config = config_of(keys)
    gpt = lively_model(config)
    if config.model.gpt_j_residual:  # added up over the processes: halves of even numbers are exact
        gpt.load_state_dict({name: tensor.bfloat16().float() for name, tensor in gpt.state_dict().items()})
    contents = []
    for number, division in enumerate([Division(), Division(2), Division(1, stages=1), Division(2, stages=2)]):
        division = Division(division.tensor_parallel, division.stages, config.model.gpt_j_residual)
        path = save_model(tmp_path / str(number), config, gpt, division=division)
        export(path, tmp_path / f"hf{number}", save_tokenizer=False, check=number == 1)
        contents.append((tmp_path / f"hf{number}" / "model.safetensors").read_bytes())
    assert [content == contents[0] for content in contents] == [True] * 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_zero_stage_gives_the_same_bytes(world_size: int, tmp_path: Path, export: Export) -> None:
    keys = {**LLAMA, "num_layers": 2}
    plain = save_model(tmp_path / "plain", config_of(keys), lively_model(config_of(keys)))
    export(plain, tmp_path / "hf", save_tokenizer=False)
    expected = (tmp_path / "hf" / "model.safetensors").read_bytes()
    for stage in range(1, 4):
        saved = run_distributed(save_stage, world_size, str(tmp_path / f"stage{stage}"), keys, stage)[0]
        export(Path(saved), tmp_path / f"hf{stage}", save_tokenizer=False, check=False)
        assert (tmp_path / f"hf{stage}" / "model.safetensors").read_bytes() == expected


def test_shards_and_their_index(run: Path, tmp_path: Path, export: Export) -> None:
    exported = export(run, tmp_path / "hf", shard_bytes=20_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == exported.bytes == 4 * exported.parameters
    assert max(os.path.getsize(tmp_path / "hf" / file) for file in files) < 24_000


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32), ("auto", torch.float32)]
)
def test_precision_is_obeyed(precision: str, dtype: torch.dtype, run: Path, tmp_path: Path, export: Export) -> None:
    export(run, tmp_path / "hf", precision=precision)
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {dtype}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype


def test_what_an_architecture_cannot_represent_is_said_key_by_key(run: Path, tmp_path: Path, main: Callable[..., int], capsys: Any) -> None:
    assert main("--input_dir", run, "--output_dir", tmp_path / "hf", "--architecture", "neox") == 1
    error = capsys.readouterr().err
    assert error.startswith("GPTNeoXForCausalLM cannot represent this model:\n")
    assert "  norm: rmsnorm (GPTNeoXForCausalLM has layernorm only)\n" in error
    assert "  num_kv_heads: 2 (GPTNeoXForCausalLM has a key head for each query head only)\n" in error
    assert not (tmp_path / "hf").exists()


def test_a_router_from_outside_is_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "mine", ROUTERS["topk"])
    source = source_of({**EXPERTS, "moe_router_type": "mine"})
    with pytest.raises(ConversionError, match=r"What StructMoEForCausalLM cannot represent:\n  moe_router_type: mine \(.*what a plugin adds cannot"):
        choose_architecture(source, "auto", lambda name: torch.zeros(1))


def spoil_shard(run: Path) -> Path:
    file = run / "global_step3" / "mp_rank_00_model_states.pt"
    os.truncate(file, file.stat().st_size // 2)
    return run


def spoil_foreign_shard(run: Path) -> Path:
    (run / "global_step3" / "manifest.json").unlink()
    return spoil_shard(run) / "global_step3"


def lose_rank(run: Path) -> Path:
    config = config_of(LLAMA)
    path = save_model(run / "tp", config, lively_model(config), division=Division(2))
    (path / "mp_rank_01_model_states.pt").unlink()
    (path / "manifest.json").unlink()
    return path


def other_model(run: Path) -> Path:
    resolved = run / "global_step3" / "configs" / "resolved.json"
    resolved.write_text(json.dumps({**json.loads(resolved.read_text()), "num_layers": 2}))
    (run / "global_step3" / "manifest.json").unlink()
    return run / "global_step3"


def unknown_tokenizer(run: Path) -> Path:
    config = config_of(LLAMA)
    return save_model(run / "characters", config, lively_model(config))


def lost_tokenizer(run: Path) -> Path:
    config = config_of({**LLAMA, "tokenizer_type": "HFTokenizer", "vocab_file": "nowhere/tokenizer.json"})
    return save_model(run / "lost", config, lively_model(config))


def without_config(run: Path) -> Path:
    (run / "global_step3" / "manifest.json").unlink()
    (run / "global_step3" / "configs" / "resolved.json").unlink()
    return run / "global_step3"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_shard, "mp_rank_00_model_states.pt is damaged: expected"),
        (spoil_foreign_shard, "mp_rank_00_model_states.pt cannot be read: it is damaged, or not a PyTorch file"),
        (lose_rank, "mp_rank_01_model_states.pt missing. It was saved with model_parallel_size 2: copy all of its files."),
        (other_model, "sequential.4.attention.dense.weight is in the checkpoint, but not in the model that the configuration describes"),
        (
            unknown_tokenizer,
            "tokenizer_type CharLevelTokenizer cannot be written as a Hugging Face tokenizer: add --no_save_tokenizer to export the model "
            "without a tokenizer.",
        ),
        (lost_tokenizer, "vocab_file: no file nowhere/tokenizer.json"),
        (without_config, "holds no configuration (configs/): give its YAML files with --config_file."),
        (lambda run: run / "nowhere", "does not exist, so there is no checkpoint to load."),
    ],
)
def test_what_cannot_be_read_is_a_sentence_and_leaves_nothing(
    spoil: Callable[[Path], Path], sentence: str, run: Path, tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--input_dir", spoil(run), "--output_dir", tmp_path / "out" / "hf") == 1
    assert sentence in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_directory_that_is_there_is_kept_unless_forced(
    run: Path, tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    assert main("--input_dir", run, "--output_dir", tmp_path / "hf") == 1
    assert "already exists: choose another --output_dir, or add --force to replace it." in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "hf").iterdir()] == ["notes.txt"]
    assert main("--input_dir", run, "--output_dir", tmp_path / "hf", "--force") == 1
    assert (
        "hf holds notes.txt, which convert_neox_to_hf.py did not write: move it to another place, or choose another --output_dir."
        in capsys.readouterr().err
    )
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"
    (tmp_path / "hf" / "notes.txt").unlink()
    for _ in range(2):
        assert main("--input_dir", run, "--output_dir", tmp_path / "hf", "--force", "--skip-check") == 0
    assert "model.safetensors" in [file.name for file in (tmp_path / "hf").iterdir()]


@pytest.mark.parametrize("target", ["run", "run/global_step3", "."])
def test_the_checkpoint_is_not_replaced_by_its_export(target: str, run: Path, tmp_path: Path, main: Callable[..., int], capsys: Any) -> None:
    assert main("--input_dir", run / "global_step3", "--output_dir", tmp_path / target, "--force") == 1
    assert "holds the checkpoint that is read: choose another --output_dir." in capsys.readouterr().err
    assert (run / "global_step3" / "manifest.json").is_file()


def test_a_file_is_not_replaced(run: Path, tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").write_text("mine")
    assert main("--input_dir", run, "--output_dir", tmp_path / "hf", "--force") == 1
    assert "is a file, not a directory: choose another --output_dir." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", ".cache/x"])
def test_a_model_that_no_export_wrote_is_not_replaced(name: str, run: Path, tmp_path: Path, main: Callable[..., int], capsys: Any) -> None:
    """A download of somebody else's, under the very names that an export has; and a folder in an export."""
    if name.startswith("."):
        assert main("--input_dir", run, "--output_dir", tmp_path / "hf", "--skip-check") == 0
    (tmp_path / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "hf" / name).write_text("theirs")
    assert main("--input_dir", run, "--output_dir", tmp_path / "hf", "--force") == 1
    assert f"holds {Path(name).parts[0]}, which convert_neox_to_hf.py did not write" in capsys.readouterr().err
    assert (tmp_path / "hf" / name).read_text() == "theirs"


def test_an_export_through_a_link_goes_where_it_leads(run: Path, tmp_path: Path, main: Callable[..., int], capsys: Any) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "hf").symlink_to("disk")
    for _ in range(2):
        assert main("--input_dir", run, "--output_dir", tmp_path / "hf", "--force", "--skip-check") == 0
    assert (tmp_path / "hf").is_symlink()
    assert (tmp_path / "disk/model.safetensors").is_file()
    (tmp_path / "disk").rename(tmp_path / "gone")
    assert main("--input_dir", run, "--output_dir", tmp_path / "hf", "--force") == 1
    assert "hf is a symbolic link to disk, which does not exist" in capsys.readouterr().err


def test_an_export_onto_a_full_disk_is_a_sentence(run: Path, small_disk: Path | None, main: Callable[..., int], capsys: Any) -> None:
    if small_disk is None:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    (small_disk / "filling").write_bytes(b"x" * 980_000)
    assert main("--input_dir", run, "--output_dir", small_disk / "hf", "--skip-check") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{small_disk}")
    assert f"No space left on device (disk {small_disk}, " in error
    assert "Traceback" not in error
    assert [entry.name for entry in small_disk.iterdir()] == ["filling"]


def test_weights_decide_where_the_configuration_does_not(tmp_path: Path, export: Export) -> None:
    """A bias on the output of attention, which Qwen2-MoE does not have: trained, it needs another class; at zero it does not."""
    config = config_of({**EXPERTS, "moe_num_shared_experts": 1, "moe_shared_expert_gate": True, "use_bias_in_attn_linear": True})
    gpt = lively_model(config)
    assert export(save_model(tmp_path / "run", config, gpt), tmp_path / "hf", save_tokenizer=False).class_name == "StructMoEForCausalLM"
    for name, tensor in gpt.state_dict().items():
        if name.endswith("attention.dense.bias"):
            tensor.zero_()
    assert export(save_model(tmp_path / "zero", config, gpt), tmp_path / "hf0", save_tokenizer=False).class_name == "Qwen2MoeForCausalLM"


@pytest.mark.parametrize("text", [" leading", "  two leading", "a    b", "b  ", "\n\tx y", " ", "", "naïve 東京 🙂"])
def test_spaces_of_a_sentence_piece_model(text: str, tmp_path: Path, shared_dir: Path) -> None:
    file = str(shared_dir / "data" / "tokenizers" / "llama2_tokenizer.model")
    data = config_of({**LLAMA, "tokenizer_type": "SPMTokenizer", "vocab_file": file}).data
    save_tokenizer(data, tmp_path)
    ours, theirs = build_tokenizer(data), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == ours.decode(ids)


def test_a_wrong_conversion_is_found_and_leaves_nothing(run: Path, tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.convert.architectures.llama import Llama
    from megatron.convert.errors import ConversionError

    right = Llama.settings
    monkeypatch.setattr(Llama, "settings", lambda self, source: {**right(self, source), "rms_norm_eps": 0.1})
    with pytest.raises(
        ConversionError, match=r"does not give the logits of the original. Largest difference of a logit: .* in float64, more than the 1e-04"
    ):
        export(run, tmp_path / "out" / "hf")
    assert not list((tmp_path / "out").iterdir())


def test_another_programs_yaml_files_describe_its_model(run: Path, tmp_path: Path, export: Export) -> None:
    """GPT-NeoX leaves the files that it was given, and no resolved configuration."""
    checkpoint = run / "global_step3"
    resolved = json.loads((checkpoint / "configs" / "resolved.json").read_text())
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "configs" / "resolved.json").unlink()
    model = {key: resolved[key] for key in (*LLAMA, "no_weight_tying")}
    (checkpoint / "configs" / "model.yml").write_text(json.dumps(model))
    (checkpoint / "configs" / "data.yml").write_text(json.dumps({key: resolved[key] for key in ("vocab_file",)} | {"train-iters": 8}))
    resolved_model = {**model, "tokenizer-type": "HFTokenizer", "vocab-file": resolved["vocab_file"]}
    (tmp_path / "given.yml").write_text(json.dumps({key: value for key, value in resolved_model.items() if key != "tokenizer_type"}))
    export(checkpoint, tmp_path / "from_given", config_files=(tmp_path / "given.yml",))
    export(checkpoint, tmp_path / "from_own", save_tokenizer=False)
    assert (tmp_path / "from_given" / "model.safetensors").read_bytes() == (tmp_path / "from_own" / "model.safetensors").read_bytes()
