"""No code of an imported folder runs without consent: harmless files leave a mark when they run, wherever a library looks for code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron.convert.architectures.structmoe import CODE
from megatron.convert.to_huggingface import Exported
from tests.convert.models import CASES, VOCABULARY, config_of, lively_model, save_model
from tests.convert.structmoe_cases import GATED_STRUCTMOE

Change = Callable[[Path, str], object]


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    """tools/ckpts/convert_hf_to_neox.py."""
    module = tool("tools/ckpts/convert_hf_to_neox.py")
    return lambda *words: int(module.main([str(word) for word in words]))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, saved by transformers."""
    directory = tmp_path_factory.mktemp("llama")
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, max_position_embeddings=64)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def structmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of this project's own class."""
    from megatron.convert.to_huggingface import Export, export_checkpoint
    from megatron.data.progress import build_reporter

    directory = tmp_path_factory.mktemp("structmoe")
    config = config_of({**CASES["llama"][1], **GATED_STRUCTMOE, "ffn_hidden_size": None})
    save_model(directory / "run", config, lively_model(config))
    export_checkpoint(Export(directory / "run", directory / "hf", save_tokenizer=False, check=False), build_reporter())
    return directory / "hf"


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def modeling(directory: Path, mark: str) -> None:
    """A model class of its own, under a model_type of transformers'."""
    (directory / "modeling_mine.py").write_text(
        f"{mark}\nfrom .configuration_mine import MineConfig\nfrom transformers import LlamaForCausalLM\n"
        "class Mine(LlamaForCausalLM): config_class = MineConfig\n"
    )
    (directory / "configuration_mine.py").write_text(f"{mark}\nfrom transformers import LlamaConfig\nclass MineConfig(LlamaConfig): pass\n")
    change_config(directory, auto_map={"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"})


def configuration(directory: Path, mark: str) -> None:
    modeling(directory, mark)
    change_config(directory, auto_map={"AutoConfig": "configuration_mine.MineConfig"})


def of_another_repository(directory: Path, mark: str) -> None:
    modeling(directory, mark)
    change_config(directory, auto_map={"AutoModelForCausalLM": "someone/else--modeling_mine.Mine"})


def no_mapping(directory: Path, mark: str) -> None:
    modeling(directory, mark)
    change_config(directory, auto_map="modeling_mine.Mine")


def one_byte(directory: Path, mark: str) -> None:
    file = directory / CODE[0].name
    file.write_bytes(file.read_bytes() + b"\n")


def further_import(directory: Path, mark: str) -> None:
    (directory / "helper.py").write_text(mark)
    file = directory / "experts_structmoe.py"
    file.write_text(file.read_text().replace("import torch\n", "import torch\nfrom . import helper\n", 1))


def own_code_elsewhere(directory: Path, mark: str) -> None:
    modeling(directory, mark)
    names = json.loads((directory / "config.json").read_text())["auto_map"]
    change_config(directory, auto_map={**names, "AutoConfig": "configuration_structmoe.StructMoEConfig"})


def a_link(directory: Path, mark: str) -> None:
    (directory / "other.py").write_text(mark)
    (directory / "moe_structmoe.py").unlink()
    (directory / "moe_structmoe.py").symlink_to(directory / "other.py")


REFUSED: dict[str, tuple[str, Change, str]] = {
    "auto_map": ("llama", modeling, "config.json names Python code for the model (auto_map: configuration_mine.MineConfig)"),
    "configuration alone": ("llama", configuration, "(auto_map: configuration_mine.MineConfig)"),
    "another repository": ("llama", of_another_repository, "(auto_map: someone/else--modeling_mine.Mine)"),
    "no mapping": ("llama", no_mapping, "(auto_map: modeling_mine.Mine)"),
    "one byte": ("structmoe", one_byte, f"{CODE[0].name} differs from the file of that name that this version writes"),
    "further import": ("structmoe", further_import, "experts_structmoe.py differs from the file of that name that this version writes"),
    "another class": ("structmoe", own_code_elsewhere, "(auto_map: configuration_structmoe.StructMoEConfig)"),
    "a link": ("structmoe", a_link, "moe_structmoe.py differs from the file of that name that this version writes"),
}


@pytest.fixture
def marked(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str, Change], tuple[Path, Path]]:
    """A changed copy of a folder, and the file that is there after code of it has run."""

    def make(kind: str, change: Change) -> tuple[Path, Path]:
        shutil.copytree(request.getfixturevalue(kind), tmp_path / "theirs")
        change(tmp_path / "theirs", f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        return tmp_path / "theirs", tmp_path / "ran"

    return make


@pytest.mark.parametrize("case", REFUSED)
def test_code_of_a_folder_is_refused(
    case: str, marked: Callable[..., tuple[Path, Path]], main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, change, sentence = REFUSED[case]
    folder, ran = marked(kind, change)
    assert main("--model_path", folder, "--output_dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "add --trust-remote-code" in error
    assert not ran.exists()
    assert not (tmp_path / "run").exists()
    assert main("--model_path", folder, "--output_dir", tmp_path / "run", "--skip-check") == 0
    assert "This code did not run. The weights were read as those of " in capsys.readouterr().out
    assert not ran.exists()


def test_code_runs_where_it_is_trusted(
    marked: Callable[..., tuple[Path, Path]], main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ran = marked("llama", modeling)
    assert main("--model_path", folder, "--output_dir", tmp_path / "run", "--trust-remote-code") == 0
    assert ran.exists()
    assert "Compared with the original: largest difference" in capsys.readouterr().out


def custom_generate(directory: Path, mark: str) -> None:
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(f"{mark}\ndef generate(model, **kwargs): pass\n")


def beside_ours(directory: Path, mark: str) -> None:
    (directory / "helper.py").write_text(mark)
    (directory / "__init__.py").write_text(mark)


def tokenizer(directory: Path, mark: str) -> None:
    (directory / "tokenization_mine.py").write_text(f"{mark}\nfrom transformers import PreTrainedTokenizerFast as Mine\n")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "tokenization_mine.Mine"]}})
    )
    words = {f"word{number}": number for number in range(VOCABULARY)}
    Tokenizer(WordLevel(words, "word0")).save(str(directory / "tokenizer.json"))


def kernels_of_the_hub(directory: Path, mark: str) -> None:
    change_config(directory, attn_implementation="someone/attention", experts_implementation="someone/experts")


def adapter(directory: Path, mark: str) -> None:
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else", "peft_type": "LORA"}))


@pytest.mark.parametrize("kind", ["llama", "structmoe"])
@pytest.mark.parametrize("change", [custom_generate, beside_ours, tokenizer, kernels_of_the_hub, adapter])
def test_what_lies_beside_a_model_does_not_run(
    kind: str, change: Change, marked: Callable[..., tuple[Path, Path]], main: Callable[..., int], tmp_path: Path, export: Callable[..., Exported]
) -> None:
    """And an import of it is exported again without running it, nor with it in the export."""
    folder, ran = marked(kind, change)
    assert main("--model_path", folder, "--output_dir", tmp_path / "run") == 0
    export(tmp_path / "run", tmp_path / "back", save_tokenizer=change is tokenizer)
    assert not ran.exists()
    assert {path.name for path in (tmp_path / "back").rglob("*.py")} == ({file.name for file in CODE} if kind == "structmoe" else set())
    for file in (tmp_path / "back").glob("*.json"):
        assert "mine" not in file.read_text().lower()


@pytest.mark.parametrize("trusted", [False, True])
def test_plugins_of_a_checkpoint_are_imported_only_where_it_is_trusted(
    trusted: bool, tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = f"plugin_of_a_stranger_{trusted}".lower()
    (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config = config_of(CASES["llama"][1])
    path = save_model(tmp_path / "run", config, lively_model(config))
    resolved = next((path / "configs").glob("*.json"))
    resolved.write_text(json.dumps({**json.loads(resolved.read_text()), "plugins": [module]}))
    (path / "manifest.json").unlink(missing_ok=True)
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        "--input_dir",
        path,
        "--output_dir",
        tmp_path / "hf",
        "--no_save_tokenizer",
        "--skip-check",
        *(["--trust-remote-code"] if trusted else []),
    ]
    status = tool("tools/ckpts/convert_neox_to_hf.py").main([str(word) for word in words])
    assert (status, (tmp_path / "ran").exists()) == ((0, True) if trusted else (1, False))
    if not trusted:
        assert f"names plugins ({module}). Their code would run here. If you trust the person who" in capsys.readouterr().err
