"""Bad YAML -> the exact message. The table is bad_input.yml; each case is a file beside a `base.yml` with the required keys that it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron.config.loader import load_config
from megatron.config.section import ConfigError

BASE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}

CASES = [(case["given"], case["problems"]) for case in yaml.safe_load(Path(__file__).with_name("bad_input.yml").read_text())]


@pytest.mark.parametrize(("text", "problems"), CASES, ids=[text.splitlines()[-1][:50] for text, _ in CASES])
def test_every_mistake_gets_its_sentence(text: str, problems: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {line.split(":")[0].replace("-", "_") for line in text.splitlines()}
    Path("base.yml").write_text("".join(f"{key}: {value}\n" for key, value in BASE.items() if key not in given))
    Path("bad.yml").write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["base", "bad.yml"])
    assert caught.value.problems == problems


def test_all_problems_come_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yml").write_text("hidden_size: 64\nmoe_num_experts: 8\n\nmoe_top_k: 9\nnorm: rms\n")
    Path("b.yml").write_text("hidden-size: 64\nlog_intervall: 5\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["a", "b"], ["warmup=2", "nonsense"])
    assert (
        str(caught.value)
        == """10 problem(s) in the configuration:
  b.yml:1: 'hidden_size' is already given at a.yml:1; a key may stand in one file only
  command line: 'nonsense' is not an override; write key=value, or key.inner=value for a value inside a dictionary
  b.yml:2: unknown key 'log_intervall'; did you mean 'log_interval'?
  'num_layers' must be given: Number of transformer layers
  'num_attention_heads' must be given: Number of attention heads (query heads)
  'seq_length' must be given: Number of tokens in one training sequence
  'max_position_embeddings' must be given: Number of tokens in the longest sequence that the model can read
  a.yml:5: 'norm' = 'rms': must be 'layernorm', 'rmsnorm', 'scalenorm' or 'non_parametric_layernorm'
  a.yml:4: 'moe_top_k' = 9: must be at most moe_num_experts (8)
  command line: 'warmup' = 2: must be at most 1"""
    )


FILES: list[tuple[str, str]] = [
    ("absent", "configs/absent.yml: no such file"),
    ("quickstrt", "configs/quickstrt.yml: no such file; did you mean 'quickstart.yml'?"),
    ("folder.yml", "configs/folder.yml: is a directory, not a file; give the YAML files in it by name"),
    ("latin1", "configs/latin1.yml: is not UTF-8 text; save it as UTF-8"),
    ("nowhere/x", "configs/nowhere/x.yml: no such file: there is no directory 'configs/nowhere'"),
]


@pytest.mark.parametrize(("name", "problem"), FILES)
def test_a_file_that_cannot_be_read_is_named(name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "folder.yml").mkdir(parents=True)
    (tmp_path / "configs" / "quickstart.yml").write_text("num_layers: 2\n")
    (tmp_path / "configs" / "latin1.yml").write_bytes(b"log_dir: caf\xe9\n")
    with pytest.raises(ConfigError) as caught:
        load_config([name], conf_dir=Path("configs"))
    assert caught.value.problems == [problem]


def test_two_files_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yml").write_text("" if folder == "b" else "".join(f"{key}: {value}\n" for key, value in BASE.items()))
    with pytest.raises(ConfigError) as caught:
        load_config(["a/x", "b/x"])
    assert caught.value.problems == ["b/x.yml: another file is also named 'x.yml'; checkpoints save all files in one folder, so rename one of them"]


def test_one_file_given_twice_is_no_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.yml").write_text("".join(f"{key}: {value}\n" for key, value in BASE.items()))
    with pytest.raises(ConfigError) as caught:
        load_config(["a/x", "a/../a/x.yml"])
    assert caught.value.problems == ["a/../a/x.yml: this file is given twice; name it once"]
