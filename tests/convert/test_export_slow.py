"""What takes minutes: an export in an environment of its own, and one of three billion parameters in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.save import resolved_config_document
from megatron.config.size import count_parameters
from megatron.convert.to_huggingface import Exported
from megatron.testing.tiny import TINY_STRUCTMOE, tiny_config
from megatron.training.setup import checkpoint_args
from tests.convert.models import lively_model, save_model

pytestmark = pytest.mark.slow
GIGABYTE = 2**30
MEASURED = """
import resource, subprocess, sys

status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
USE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = sys.argv[1]
assert not any(name.split(".")[0] in ("megatron", "deepspeed") for name in sys.modules)
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
inputs = tokenizer("our fathers brought forth", return_tensors="pt")
before = model.generate(**inputs, max_new_tokens=12, do_sample=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model.train()
first = model(**inputs, labels=inputs["input_ids"]).loss
first.backward()
optimizer.step()
assert model(**inputs, labels=inputs["input_ids"]).loss < first
model.eval().save_pretrained(directory + "-trained")
again = AutoModelForCausalLM.from_pretrained(directory + "-trained", trust_remote_code=True)
assert torch.equal(again(**inputs).logits, model(**inputs).logits)
print("generated", before.shape[1] - inputs["input_ids"].shape[1])
"""


def test_an_environment_of_torch_and_transformers_alone(tmp_path: Path, tokenizer_file: Path, export: Callable[..., Exported]) -> None:
    config = tiny_config(
        {**TINY_STRUCTMOE, "seq_length": 64, "max_position_embeddings": 64}, tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file)
    )
    export(save_model(tmp_path / "run", config, lively_model(config)), tmp_path / "hf")
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    import transformers

    packages = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={transformers.__version__}"]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    index = os.environ.get("TORCH_INDEX_URL")
    extra = ["--extra-index-url", index] if index else []
    subprocess.run([python, "-m", "pip", "install", "-q", *extra, *packages], env=environment, check=True, timeout=1500, capture_output=True)
    finished = subprocess.run([python, "-c", USE, tmp_path / "hf"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.startswith("generated ")


def test_three_billion_parameters_in_less_than_four_gigabytes(tmp_path: Path, repository: Path) -> None:
    """Layer files as a pipeline writes them, in bf16; the export in float32."""
    width, kv, hidden, layers, vocabulary = 2560, 512, 10_240, 28, 32_000
    shape = {"num_layers": layers, "hidden_size": width, "num_attention_heads": 20, "num_kv_heads": 4, "ffn_hidden_size": hidden}
    shape |= {"norm": "rmsnorm", "activation": "swiglu", "use_bias_in_mlp": False, "use_bias_in_attn_linear": False, "precision": "bfloat16"}
    config = tiny_config(**shape, tokenizer_type="CharLevelTokenizer")
    parameters = count_parameters(config.model, config.moe, vocabulary).total_sum
    assert parameters > 2.8e9
    path = tmp_path / "global_step1"
    (path / "configs").mkdir(parents=True)

    def write(number: int, **weights: tuple[int, ...]) -> None:
        tensors = {name.replace("__", "."): torch.randn(size).bfloat16() for name, size in weights.items()}
        torch.save(tensors, path / f"layer_{number:02d}-model_00-model_states.pt")

    write(0, word_embeddings__weight=(vocabulary, width))
    for layer in range(layers):
        norms = {"input_layernorm__scale": (width,), "post_attention_layernorm__scale": (width,)}
        attention = {"attention__query_key_value__weight": (width + 2 * kv, width), "attention__dense__weight": (width, width)}
        write(layer + 2, **norms, **attention, mlp__linear1__weight=(2 * hidden, width), mlp__linear2__weight=(width, hidden))
    write(layers + 3, norm__scale=(width,))
    write(layers + 4, final_linear__weight=(vocabulary, width))
    head = {"module": None, "iteration": 1, "args": checkpoint_args(config, vocabulary), "gqa_layout": "q,k,v"}
    torch.save(head, path / "mp_rank_00_model_states.pt")
    for name, text in resolved_config_document(config.flat()).items():
        (path / "configs" / name).write_text(text)

    tool = repository / "tools" / "ckpts" / "convert_neox_to_hf.py"
    words = ["--input_dir", path, "--output_dir", tmp_path / "hf", "--precision", "fp32", "--skip-check", "--no_save_tokenizer"]
    finished = subprocess.run([sys.executable, "-c", MEASURED, sys.executable, tool, *words], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert 0.5 * GIGABYTE < int(finished.stdout.splitlines()[-1]) * 1024 < 4 * GIGABYTE
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * parameters
