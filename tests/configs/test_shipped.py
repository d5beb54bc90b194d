"""Every file of configs/: it loads, says in its head how large it is and how many tokens a step takes, and both are so."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from megatron.config.loader import LoadedConfig, load_config
from megatron.config.section import ConfigError
from megatron.config.size import ParameterCount, count_parameters, padded_vocab_size, training_memory
from megatron.config.training import resolve_batch
from tests.configs.published import FIGURES, VOCABULARIES, Published
from tests.scripts import run_script

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
FILES = {path.relative_to(CONFIGS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(CONFIGS.rglob("*.yml"))}
MODELS = [name for name, text in FILES.items() if "num_layers" in text]
SETUPS = [name for name in FILES if name not in MODELS]
OWN_MODELS = {"quickstart.yml", "cosmoes/local_experts.yml", "cosmoes/local_experts_baseline.yml"}  # published nowhere else
OWN_MODELS |= {name for name in FILES if name.startswith(("routers/", "moe/quickstart-"))}  # the quickstart with other routers and experts
PARAMETERS = re.compile(
    r"^# Parameters: ([\d,]+)(?: \(([\d,]+) active\))? with a vocabulary of ([\d,]+) \((.+)'s ([\d,]+) tokens(?:, padded)?\)$", re.M
)
LAYOUT = re.compile(r"^# On 64 GPUs: (\d+) sequences? x (\d+) accumulation steps each, ZeRO stage (\d): ([\d.]+) GiB each without activations$", re.M)
TOKENS = re.compile(r"^# Tokens per step: ([\d,]+) \(([\d,]+) sequences of ([\d,]+)\); in all: ([\d,]+)$", re.M)


class Head(NamedTuple):
    """What a model file says about its size."""

    total: int
    active: int
    padded: int
    tokenizer: str
    vocabulary: int


def number(text: str) -> int:
    return int(text.replace(",", ""))


def head(name: str) -> Head:
    found = PARAMETERS.search(FILES[name])
    assert found, f"{name} does not say `# Parameters: N with a vocabulary of V (X's Y tokens, padded)`"
    total, active, padded, tokenizer, vocabulary = found.groups()
    return Head(number(total), number(active or total), number(padded), tokenizer, number(vocabulary))


def load(*names: str) -> LoadedConfig:
    return load_config(names, conf_dir=CONFIGS)


def count(name: str) -> ParameterCount:
    config = load(name).config
    return count_parameters(config.model, config.moe, padded_vocab_size(head(name).vocabulary, config.model.make_vocab_size_divisible_by))


def test_the_folder_is_where_it_is_thought_to_be() -> None:
    assert len(MODELS) > 30
    assert {"local_setup.yml", "cpu_setup.yml", "slurm.yml", "text_generation.yml"} <= set(SETUPS)


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is(name: str) -> None:
    lines = FILES[name].splitlines()
    assert re.match(r"# \S.{30,}", lines[0]), "the first line says what the file is"
    assert max(map(len, lines)) <= 150


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_MODELS])
def test_a_model_says_where_it_comes_from(name: str) -> None:
    assert "\n# Source: " in FILES[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loads_alone_and_nothing_in_it_is_without_effect(name: str) -> None:
    assert load(name).notices == ()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_large_as_its_head_says(name: str) -> None:
    said, counted, model = head(name), count(name), load(name).config.model
    assert (counted.total_sum, counted.active_sum) == (said.total, said.active)
    assert said.padded == padded_vocab_size(said.vocabulary, model.make_vocab_size_divisible_by)
    assert said.vocabulary == VOCABULARIES[said.tokenizer]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_takes_as_many_tokens_as_the_head_says(name: str) -> None:
    found = TOKENS.search(FILES[name])
    assert found, f"{name} does not say `# Tokens per step: N (B sequences of S); in all: T`"
    config = load(name).config
    sequences, steps = resolve_batch(config.training, 1).global_, config.training.train_iters or 0
    tokens = sequences * config.model.seq_length
    assert [number(group) for group in found.groups()] == [tokens, sequences, config.model.seq_length, tokens * steps]


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name.split("/")[0] in ("structmoe", "cosmoes", "mixtral", "moe") and name not in OWN_MODELS]
)
def test_a_paper_s_model_is_laid_out_on_64_gpus_as_the_head_says(name: str) -> None:
    found = LAYOUT.search(FILES[name])
    assert found, f"{name} does not say `# On 64 GPUs: M sequences x A accumulation steps each, ZeRO stage Z: G GiB each without activations`"
    config = load(name).config
    batch, stage = resolve_batch(config.training, 64), config.optimizer.zero_optimization.stage
    memory = training_memory(count(name).total_sum, str(config.precision), zero_stage=stage, data_parallel_size=64)
    assert found.groups() == (str(batch.micro), str(batch.accumulation), str(stage), f"{memory.total / 2**30:.1f}")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_MODELS])
def test_a_model_is_as_large_as_published(name: str) -> None:
    assert FIGURES.get(name), f"tests/configs/published.py has no figure for {name}"
    counted = count(name)
    figures = {
        "all": counted.total_sum,
        "outside the embeddings": counted.total_sum - counted.total["embedding"] - counted.total["head"],
        "embeddings once": counted.total_sum - counted.total["head"],
        "active": counted.active_sum,
        "experts": counted.total["experts"] + counted.total["lores"],
    }
    for published in FIGURES[name]:
        assert figures[published.counted] == pytest.approx(published.figure, rel=published.tolerance, abs=0), published.source


@pytest.mark.parametrize(
    ("tokenizer", "kind", "files"),
    [
        ("GPT-NeoX-20B", "HFTokenizer", ("20B_tokenizer.json",)),
        ("Llama", "SPMTokenizer", ("llama2_tokenizer.model",)),
        ("Llama 3", "TiktokenTokenizer", ("llama3_tokenizer.model",)),
        ("Mistral", "SPMTokenizer", ("mistral_v1_tokenizer.model",)),
    ],
)
def test_a_tokenizer_has_as_many_tokens_as_the_heads_say(tokenizer: str, kind: str, files: tuple[str, ...], shared_dir: Path) -> None:
    from megatron.data.tokenizer import load_tokenizer

    assert load_tokenizer(kind, *(str(shared_dir / "data" / "tokenizers" / file) for file in files)).vocab_size == VOCABULARIES[tokenizer]


def test_the_readme_names_every_file() -> None:
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    places = {name: (f"`{name.rpartition('/')[0]}/`" if "/" in name else "", f"`{Path(name).stem}`") for name in FILES}
    missing = [name for name, (folder, stem) in places.items() if not any(folder in row and stem in row for row in rows)]
    assert not missing


def test_every_published_figure_belongs_to_a_file() -> None:
    assert set(FIGURES) <= set(MODELS)


def test_a_wrong_figure_is_noticed() -> None:
    """The comparison above is exact where the table says so."""
    published = Published(405_334_017, "all", 0.0, "one too many")
    assert count("pythia/410M.yml").total_sum != pytest.approx(published.figure, rel=published.tolerance, abs=0)


# ---------------------------------------------------------------- files that go together


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_MODELS])
def test_every_model_goes_with_the_local_setup(name: str) -> None:
    loaded = load(name, "local_setup.yml", "text_generation.yml")
    assert loaded.notices == ()
    assert loaded.config.data.train_data_paths


@pytest.mark.parametrize("name", SETUPS)
def test_every_setup_goes_with_a_model(name: str) -> None:
    assert load("19M.yml", name).notices == ()


@pytest.mark.parametrize("name", SETUPS)
def test_a_setup_alone_says_what_is_missing(name: str) -> None:
    with pytest.raises(ConfigError, match="'num_layers' must be given"):
        load(name)


def test_the_json_file_is_the_yaml_file_in_strict_json() -> None:
    assert json.loads((CONFIGS / "slurm_local.json").read_text(encoding="utf-8")) == yaml.safe_load(FILES["slurm_local.yml"])
    assert load("19M.yml", "slurm_local.json").config == load("19M.yml", "slurm_local.yml").config


def test_slurm_local_is_local_setup_and_slurm() -> None:
    assert yaml.safe_load(FILES["slurm_local.yml"]) == yaml.safe_load(FILES["local_setup.yml"]) | yaml.safe_load(FILES["slurm.yml"])


HEADS = "\n".join(text.split("\n{")[0] for text in FILES.values())
COMMANDS = sorted(set(re.findall(r"python (deepy\.py [^`\n]+)", HEADS)))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_in_the_heads_pass_the_check(command: str, repository: Path, tmp_path: Path) -> None:
    script, *words = shlex.split(command)
    done = run_script(script, *words, "--check", folder=repository, environment=os.environ, timeout=60, outputs=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cannot train yet" not in done.stdout
