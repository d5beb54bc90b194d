"""Exports in llama.cpp: its converter takes them, it loads them, and its greedy text is ours.

Two things must be there: the package `xllamacpp` (llama.cpp, compiled), and llama.cpp's converter, which its sources have. `pip download --no-deps
--no-binary llama-cpp-python llama-cpp-python` gives these sources in `vendor/llama.cpp`; LLAMA_CPP is that folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.convert.to_huggingface import Exported
from megatron.inference.continuation import sample_generator
from megatron.inference.engine import Engine, Request
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.runner import build_runner
from megatron.inference.sampling import Sampling
from tests.convert import models
from tests.convert.models import CASES, config_of, lively_model, save_model
from tests.convert.test_generation import Endless

CONVERTER = Path(os.environ.get("LLAMA_CPP", "nowhere")) / "convert_hf_to_gguf.py"
VOCABULARY = 50257
TOKENS = 24
EVERYWHERE = {"moe_layers": None, "moe_expert_interval": 1}
MODELS: dict[str, dict[str, Any]] = {
    **{name: CASES[name][1] for name in ("llama", "llama-3.1", "olmo", "olmo2", "qwen3", "mixtral", "olmoe")},
    **{name: {**CASES[name][1], **EVERYWHERE} for name in ("qwen3-moe-normalized", "qwen2-moe")},
}
"""What llama.cpp computes as we do. Its converter cannot read Qwen's dense layers between layers with experts, and
it drops a window. It has other weights of experts in Qwen3's class, unless they sum to one."""
GENERATE = """
import json, sys
import xllamacpp as llama
parameters = llama.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.n_gpu_layers = sys.argv[1], 80, 1, False, 0
parameters.cache_type_k = parameters.cache_type_v = llama.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = llama.Server(parameters)
settings = {"n_predict": int(sys.argv[3]), "temperature": 0, "samplers": ["temperature"], "ignore_eos": True}
answers = [server.handle_completions({"prompt": prompt, **settings}) for prompt in json.loads(sys.argv[2])]
print("ANSWERS" + json.dumps([answer["choices"][0]["text"] for answer in answers]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CONVERTER.is_file(), reason="LLAMA_CPP does not name the sources of llama.cpp, which have its converter"),
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="the package xllamacpp (llama.cpp, compiled) is not installed"),
]


def ours(ready: ReadyModel, prompts: Sequence[Sequence[int]]) -> list[str]:
    endless = replace(ready, tokenizer=Endless(ready.tokenizer), ends=())
    engine = Engine(endless, build_runner(endless), maximum_requests=len(prompts))
    texts = {engine.submit(Request(prompt, Sampling(), TOKENS, sample_generator(0, 0))): "" for prompt in prompts}
    while engine.busy:
        for event in engine.step():
            texts[event.request] += event.text
    return list(texts.values())


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_writes_what_we_write(
    name: str, tmp_path: Path, shared_dir: Path, export: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "VOCABULARY", VOCABULARY)
    tokenizer = shared_dir / "data" / "tokenizers" / "gpt2"
    files: dict[str, Any] = {"vocab_file": str(tokenizer / "vocab.json"), "merge_file": str(tokenizer / "merges.txt")}
    keys = {**MODELS[name], **files, "tokenizer_type": "GPT2BPETokenizer", "load": str(tmp_path / "run"), "make_vocab_size_divisible_by": 1}
    config = config_of(keys)
    gpt = lively_model(config)
    if name == "qwen2-moe":  # it has no bias there
        for key, tensor in gpt.state_dict().items():
            if key.endswith("attention.dense.bias"):
                tensor.zero_()
    save_model(tmp_path / "run", config, gpt)
    export(tmp_path / "run", tmp_path / "hf")

    convert = [sys.executable, str(CONVERTER), str(tmp_path / "hf"), "--outtype", "f32", "--outfile", str(tmp_path / "model.gguf")]
    converted = subprocess.run(convert, capture_output=True, text=True, timeout=150, check=False)
    assert converted.returncode == 0, converted.stderr[-2000:]
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(VOCABULARY - 300, (length,), generator=generator).tolist() for length in (1, 5, 11, 16)]
    words = [sys.executable, "-c", GENERATE, str(tmp_path / "model.gguf"), json.dumps(prompts), str(TOKENS)]
    generated = subprocess.run(words, capture_output=True, text=True, timeout=150, check=False)
    line = next((line for line in generated.stdout.splitlines() if line.startswith("ANSWERS")), None)
    assert line is not None, generated.stderr[-2000:]
    theirs = json.loads(line.removeprefix("ANSWERS"))
    assert [text.rstrip("\ufffd") for text in ours(load_ready_model(config), prompts)] == [text.rstrip("\ufffd") for text in theirs]
