"""An export of StructMoEForCausalLM works where this package is not: loads, generates, trains, saves what it was loaded from, and loads again.

Each interpreter here is fresh, cannot import this package, and has an empty cache of remote code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron.convert.architectures.structmoe import CODE, StructMoE
from megatron.convert.mapping import to_ours, to_theirs
from tests.convert.structmoe_cases import CASES
from tests.convert.structmoe_model import pair, tokens

EXPORTED = {
    "structmoe": "structmoe swiglu both",
    "sigmoid": "sigmoid groups",
    "tied": "tied head",
    "rpe": "window rpe gqa",
    "odd": "odd experts",
    "around": "smoe_dropout, constant experts and latent",
}

ALONE = """
import sys, warnings

# None: the name is looked up as a module that is not installed. accelerate, where it is installed, would import deepspeed.
for name in ("megatron", "tests", "deepspeed", "pydantic", "accelerate"):
    sys.modules[name] = None
try:
    import megatron
    sys.exit("the package could be imported")
except ModuleNotFoundError:
    pass

from pathlib import Path
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

def load(path, **options):
    model, report = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model
"""
FIRST = """
for name in sys.argv[2:]:
    folder = Path(sys.argv[1], name)
    model = load(folder)
    assert type(model).__name__ == "StructMoEForCausalLM" and not model.training
    inputs, expected = torch.load(folder / "expected.pt")
    torch.testing.assert_close(model(inputs).logits, expected, rtol=0, atol=3e-5)
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model.lm_head(bare(inputs).last_hidden_state), model(inputs).logits)
    half = load(folder, dtype=torch.bfloat16)
    assert {key for key, tensor in half.state_dict().items() if tensor.dtype != torch.bfloat16} == {
        key for key in model.state_dict() if key.endswith(("e_score_correction_bias", "experts_per_token"))
    }
    assert torch.equal(model.generate(inputs[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)[:, :5], inputs[:, :5])

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(inputs, labels=inputs).loss
    before.backward()
    optimizer.step()
    model.eval()
    assert model(inputs, labels=inputs).loss < before
    saved = Path(sys.argv[1], "saved", name)
    model.save_pretrained(saved)
    with torch.no_grad():
        torch.save((inputs, model(inputs).logits), saved / "expected.pt")
"""
SECOND = """
for name in sys.argv[2:]:
    model = load(Path(sys.argv[1], name))
    inputs, expected = torch.load(Path(sys.argv[1], name, "expected.pt"))
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, expected)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (name == "tied") == model.config.tie_word_embeddings
"""


def export(name: str, folder: Path) -> None:
    """What an export of this case holds, and the logits that our model gives."""
    source, gpt, state, _ = pair(**CASES[name])
    architecture = StructMoE()
    settings = {"model_type": architecture.model_type, "architectures": [architecture.class_name], **architecture.settings(source)}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    weights = {named.name: named.tensor.contiguous() for named in to_theirs(architecture.table(source), state.__getitem__)}
    save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    for file in CODE:
        shutil.copy(file, folder)
    with torch.no_grad():
        torch.save((tokens(), gpt(tokens()).logits_BSV), folder / "expected.pt")


def run_alone(program: str, *arguments: str, home: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", ALONE + program, *arguments]
    finished = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]


def test_an_export_lives_without_this_package(tmp_path: Path) -> None:
    for name, case in EXPORTED.items():
        export(case, tmp_path / name)
    homes = [tmp_path / "first home", tmp_path / "second home"]
    for home in homes:
        home.mkdir()
    run_alone(FIRST, str(tmp_path), *EXPORTED, home=homes[0])
    for name in EXPORTED:
        shutil.rmtree(tmp_path / name)
        assert {path.name for path in CODE} <= {path.name for path in (tmp_path / "saved" / name).iterdir()}
    run_alone(SECOND, str(tmp_path / "saved"), *EXPORTED, home=homes[1])


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_the_code_of_an_export_names_nothing_of_this_package(path: Path) -> None:
    imports = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
    allowed = ("__future__", "collections.abc", "copy", "dataclasses", "functools", "math", "torch", "transformers", "typing", ".")
    assert all(line.split()[1].startswith(allowed) for line in imports), imports


def test_what_transformers_saved_comes_back(tmp_path: Path) -> None:
    """`save_pretrained` leaves defaults out of config.json and tied weights out of the weights: both are found again."""
    from safetensors.torch import load_file

    from megatron.config import config_from_dict
    from megatron.convert.architecture import Source

    for name in ("tied head", "window rpe gqa", "structmoe swiglu both"):
        source, _, state, model = pair(**CASES[name])
        model.save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "config.json").read_text())
        again = Source(config_from_dict(StructMoE().keys(settings)), settings["vocab_size"])
        table = list(StructMoE().table(again))
        back = {named.name: named.tensor for named in to_ours(table, load_file(tmp_path / name / "model.safetensors").__getitem__)}
        assert again.vocabulary == source.vocabulary
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)
