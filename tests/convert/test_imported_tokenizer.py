"""Tokenizers of imports: what says how they are used survives there and back, larger ones than the model, other forms than tokenizer.json, none."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer

from megatron.config import load_config
from megatron.convert.errors import ConversionError
from megatron.convert.sentence_pieces import as_tokenizer, read_piece_model
from megatron.convert.tokenizers import SAMPLE, reads_alike
from megatron.data.tokenizer import TokenizerError, build_tokenizer, load_tokenizer
from megatron.inference.model import load_ready_model
from tests.convert.models import VOCABULARY

TEXTS = [SAMPLE, "", " ", "  two  spaces ", "a\n\nb\t", "naïve 東京 🙂", "hello<sep>world  x", "1234 = 56"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    """tools/ckpts/convert_hf_to_neox.py."""
    module = tool("tools/ckpts/convert_hf_to_neox.py")
    return lambda *words: int(module.main([str(word) for word in words]))


def save_model(directory: Path, *, tied: bool = False, rows: int = VOCABULARY) -> Path:
    settings = {"vocab_size": rows, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**settings, intermediate_size=48, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **changes}))


def test_a_model_of_our_own_class_raises_no_warning_of_transformers(tmp_path: Path, tokenizer_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers 5 warns of a type that it does not have ("can yield errors") where it reads the tokenizer beside."""
    change(tmp_path / "config.json", model_type="structmoe_neox", architectures=["StructMoEForCausalLM"])
    change(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    ours = load_tokenizer("HFTokenizer", tokenizer_file)
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    try:
        assert reads_alike(ours, tmp_path, transformers.AutoTokenizer)
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.text == ""


@pytest.fixture
def chat(tmp_path: Path, tokenizer_file: Path) -> Path:
    """A chat model whose turns end with <|im_end|> and whose documents end with <|endoftext|>; both are ends of generation."""
    directory = save_model(tmp_path / "chat")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(directory / "tokenizer.json"))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    decoder = {str(number): {"content": token.content, **flags, "special": True} for number, token in tokenizer.get_added_tokens_decoder().items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    settings |= {"added_tokens_decoder": decoder, "padding_side": "left", "model_max_length": 64, "add_bos_token": False, "odd": {"kept": True}}
    change(directory / "tokenizer_config.json", **settings)
    change(directory / "special_tokens_map.json", eos_token="<|im_end|>")
    change(directory / "config.json", eos_token_id=VOCABULARY - 1, bos_token_id=0, pad_token_id=0)
    change(directory / "generation_config.json", eos_token_id=[VOCABULARY - 1, 0], pad_token_id=0, temperature=0.7, do_sample=True)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return directory


def test_a_chat_model_comes_back_with_all_its_ends_and_settings(
    chat: Path, main: Callable[..., int], tmp_path: Path, export: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--model_path", chat, "--output_dir", tmp_path / "run") == 0
    said = f"Documents end with <|endoftext|> (0). Generation stops at <|endoftext|> (0) and <|im_end|> ({VOCABULARY - 1})."
    assert said in capsys.readouterr().out
    ready = load_ready_model(load_config([tmp_path / "run" / "config.yml"]).config)
    assert ready.tokenizer.eod == 0
    assert ready.stop_tokens == {0, VOCABULARY - 1}
    export(tmp_path / "run", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        came, given = (json.loads((folder / name).read_text()) for folder in (tmp_path / "back", chat))
        assert came == {key: value for key, value in given.items() if key != "transformers_version"}, name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (VOCABULARY - 1, 0, 0)
    assert (tmp_path / "back" / "additional_chat_templates" / "tools.jinja").is_file()
    assert not (tmp_path / "back" / "token_ids.json").exists()


def test_several_ends_in_config_json_come_back(chat: Path, main: Callable[..., int], tmp_path: Path, export: Any) -> None:
    """As Llama 3's instruction models have them; without generation_config.json they are all that says where to stop."""
    change(chat / "config.json", eos_token_id=[VOCABULARY - 1, 5, 0])
    (chat / "generation_config.json").unlink()
    assert main("--model_path", chat, "--output_dir", tmp_path / "run", "--skip-check") == 0
    assert load_ready_model(load_config([tmp_path / "run" / "config.yml"]).config).stop_tokens == {0, 5, VOCABULARY - 1}
    export(tmp_path / "run", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text())["eos_token_id"] == [VOCABULARY - 1, 5, 0]


def test_ids_that_config_json_does_not_have_are_not_made_up(chat: Path, main: Callable[..., int], tmp_path: Path, export: Any) -> None:
    """Published models of the Qwen and Pythia families name a pad_token for the tokenizer, and no pad_token_id for the model."""
    stated = json.loads((chat / "config.json").read_text())
    for key in ("pad_token_id", "bos_token_id"):
        del stated[key]
    (chat / "config.json").write_text(json.dumps(stated))
    change(chat / "generation_config.json", pad_token_id=None)
    assert main("--model_path", chat, "--output_dir", tmp_path / "run", "--skip-check") == 0
    export(tmp_path / "run", tmp_path / "back")
    config, generation = (json.loads((tmp_path / "back" / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert config.keys() & {"pad_token_id", "bos_token_id", "eos_token_id"} == {"eos_token_id"}
    assert generation.get("pad_token_id") is None


@pytest.mark.parametrize("said", [True, False, None])
def test_whether_transformers_adds_the_balance_loss_comes_back(said: bool | None, main: Callable[..., int], tmp_path: Path, export: Any) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**sizes, intermediate_size=48, max_position_embeddings=64, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "theirs")
    stated = {key: value for key, value in json.loads((tmp_path / "theirs" / "config.json").read_text()).items() if key != "output_router_logits"}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(stated if said is None else {**stated, "output_router_logits": said}))
    assert main("--model_path", tmp_path / "theirs", "--output_dir", tmp_path / "run", "--skip-check") == 0
    export(tmp_path / "run", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()).get("output_router_logits") is said


@pytest.fixture(params=[False, True], ids=["head", "tied"])
def larger(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_file: Path) -> Path:
    """A model whose tokenizer has three entries more than it has rows, as Code Llama's."""
    directory = save_model(tmp_path / "larger", tied=request.param)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens([AddedToken(f"<X{number}>", normalized=False) for number in range(5)])
    tokenizer.save(str(directory / "tokenizer.json"))
    change(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>", pad_token="<X3>")
    change(directory / "generation_config.json", pad_token_id=VOCABULARY + 1, eos_token_id=0)
    return directory


def test_a_larger_tokenizer_gets_rows_or_is_cut(
    larger: Path, main: Callable[..., int], tmp_path: Path, export: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--model_path", larger, "--output_dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "3 of the tokenizer's entries ('<X2>', '<X3>', '<X4>') have no row. Add --extra-tokens add" in error
    assert "--extra-tokens drop" in error
    before = load_file(larger / "model.safetensors")
    for tp in (1, 2):
        run = tmp_path / f"added{tp}"
        assert main("--model_path", larger, "--output_dir", run, "--extra-tokens", "add", "--tp", tp) == 0
        assert f"start as the mean of the {VOCABULARY} rows before; embedding and head now have" in capsys.readouterr().out
        export(run, tmp_path / f"back{tp}")
        after = load_file(tmp_path / f"back{tp}" / "model.safetensors")
        rows = VOCABULARY + (3 if tp == 1 else 4)  # a number that two processes can share
        assert json.loads((tmp_path / f"back{tp}" / "config.json").read_text())["vocab_size"] == rows
        for name in before.keys() & {EMBEDDING, HEAD}:
            assert torch.equal(after[name][:VOCABULARY], before[name])
            assert torch.allclose(after[name][VOCABULARY:], before[name].mean(0).expand(rows - VOCABULARY, -1), atol=1e-6)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / f"back{tp}").pad_token_id == VOCABULARY + 1
    assert main("--model_path", larger, "--output_dir", tmp_path / "cut", "--extra-tokens", "drop") == 0
    assert "('<X2>', '<X3>', '<X4>'): they are removed from the tokenizer." in capsys.readouterr().out
    export(tmp_path / "cut", tmp_path / "cut-back")
    cut = load_file(tmp_path / "cut-back" / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in cut.items())
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "cut-back")
    assert (len(loaded), loaded.pad_token) == (VOCABULARY, None)
    assert json.loads((tmp_path / "cut-back" / "generation_config.json").read_text()).get("pad_token_id") is None


def test_new_tokens_take_the_place_of_rows_that_fill_up_and_then_new_ones(
    main: Callable[..., int], tmp_path: Path, tokenizer_file: Path, export: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model has two rows more than the tokenizer has entries."""
    directory = save_model(tmp_path / "model")
    shutil.copyfile(tokenizer_file, directory / "tokenizer.json")
    change(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    before = load_file(directory / "model.safetensors")[EMBEDDING]
    mean = before[: VOCABULARY - 2].mean(0)
    assert main("--model_path", directory, "--output_dir", tmp_path / "one", "--add-tokens", "<tool>", "<|endoftext|>") == 0
    said = capsys.readouterr().out
    assert f"Added to the tokenizer: '<tool>' ({VOCABULARY - 2}). '<|endoftext|>' was there already." in said
    assert f"1 row of embedding and head, from row {VOCABULARY - 2} on, start as the mean" in said
    assert main("--model_path", directory, "--output_dir", tmp_path / "four", "--add-tokens", "<a>", "<b>", "<c>", "<d>") == 0
    export(tmp_path / "one", tmp_path / "one-back")
    export(tmp_path / "four", tmp_path / "four-back")
    one, four = (load_file(tmp_path / name / "model.safetensors")[EMBEDDING] for name in ("one-back", "four-back"))
    assert torch.allclose(one[VOCABULARY - 2], mean, atol=1e-6)
    assert torch.equal(one[VOCABULARY - 1], before[VOCABULARY - 1])
    assert len(four) == VOCABULARY + 2
    assert torch.allclose(four[VOCABULARY - 2 :], mean.expand(4, -1), atol=1e-6)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "four-back")
    assert loaded.encode("a<d>", add_special_tokens=False)[-1] == VOCABULARY + 1
    assert loaded.decode([VOCABULARY + 1], skip_special_tokens=True) == ""


def split_file(directory: Path) -> None:
    """tokenizer.json as vocab.json and merges.txt."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))


def test_two_files_of_gpt2s_are_read(chat: Path, main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = Tokenizer.from_file(str(chat / "tokenizer.json"))
    split_file(chat)
    assert main("--model_path", chat, "--output_dir", tmp_path / "run") == 0
    assert "has no tokenizer.json; it is made from vocab.json and merges.txt." in capsys.readouterr().out
    made = build_tokenizer(load_config([tmp_path / "run" / "config.yml"]).config.data)
    text = SAMPLE + "<|im_start|>x<|im_end|>"
    assert made.encode(text) == original.encode(text).ids


def test_without_a_tokenizer_nobody_chooses_one(chat: Path, main: Callable[..., int], tmp_path: Path, export: Any, capsys: Any) -> None:
    (chat / "tokenizer.json").unlink()
    (chat / "tekken.json").write_text("{}")
    assert main("--model_path", chat, "--output_dir", tmp_path / "run") == 0
    assert "holds no tokenizer that can be read (it holds tek" in capsys.readouterr().out
    keys = yaml.safe_load((tmp_path / "run" / "config.yml").read_text())
    assert (keys["tokenizer_type"], keys["vocab_size"], "vocab_file" in keys) == ("NullTokenizer", VOCABULARY, False)
    tokenizer = build_tokenizer(load_config([tmp_path / "run" / "config.yml"]).config.data)
    assert tokenizer.vocab_size == VOCABULARY
    with pytest.raises(TokenizerError, match="NullTokenizer cannot read or write text: it is for training on data that is tokenized already"):
        tokenizer.encode("text")
    exported = export(tmp_path / "run", tmp_path / "back")
    assert any("The export has no tokenizer" in notice for notice in exported.notices)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [VOCABULARY - 1, 0]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == VOCABULARY - 1
    assert main("--model_path", chat, "--output_dir", tmp_path / "more", "--add-tokens", "<a>") == 1
    assert "--add-tokens: " in capsys.readouterr().err


OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "own": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "user_defined_symbols": ["<sep>"],
        "hard_vocab_limit": False,
    },
    "bare": {"add_dummy_prefix": False},
}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sentence_pieces_as_a_tokenizer_json(kind: str, options: str, tmp_path: Path) -> None:
    """Without the package protobuf; every text is cut as the library cuts it."""
    extra = {"hard_vocab_limit": False, **OPTIONS[options]}
    lines = [*(f"hello world number {number} ab" for number in range(30)), SAMPLE.replace("\n", " ")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "m"), model_type=kind, vocab_size=380, minloglevel=2, **extra
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    made = as_tokenizer(read_piece_model(tmp_path / "m.model"), "m.model")
    for text in TEXTS:
        ids = library.encode(text)
        assert made.encode(text, add_special_tokens=False).ids == ids, text
        if library.unk_id() not in ids:
            assert made.decode(ids) == library.decode(ids), text


def test_a_damaged_sentence_piece_model_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(b"\x0a\xff\xff\x0f\x01nothing")
    with pytest.raises(ConversionError, match=r"m\.model is not a SentencePiece model"):
        read_piece_model(tmp_path / "m.model")


def test_a_class_that_reads_otherwise_than_the_file_is_said(tmp_path: Path, main: Callable[..., int], chat: Path, export: Any) -> None:
    """transformers reads the tokenizer of a Qwen2 by Qwen's rules, whatever tokenizer.json says."""
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    settings |= {"num_key_value_heads": 2}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings, max_position_embeddings=64)).save_pretrained(tmp_path / "qwen")
    content = json.loads((chat / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "qwen" / "tokenizer.json").write_text(json.dumps(content))
    assert main("--model_path", tmp_path / "qwen", "--output_dir", tmp_path / "run", "--skip-check") == 0
    exported = export(tmp_path / "run", tmp_path / "back", check=False)
    assert any("Load the tokenizer with transformers.PreTrainedTokenizerFast" in notice for notice in exported.notices)
