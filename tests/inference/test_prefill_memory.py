"""A long prompt needs no memory for the logits that nobody looks at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROMPT, VOCABULARY = 4096, 128_256
GIGABYTE = 2**30
MEASURE = f"""
import re
from pathlib import Path
import torch
from megatron.data.tokenizer.null import NullTokenizer
from megatron.inference.engine import Engine, Request
from megatron.inference.model import ReadyModel
from megatron.inference.runner import build_runner
from megatron.inference.sampling import Sampling
from megatron.model import build_model, choose_implementations
from megatron.testing.tiny import TINY_STRUCTMOE, tiny_config

class Wordless(NullTokenizer):
    def decode(self, ids):
        return ""

config = tiny_config(TINY_STRUCTMOE, hidden_size=128, seq_length={PROMPT} + 8, max_position_embeddings={PROMPT} + 8)
gpt = build_model(config.model, config.moe, {VOCABULARY}, seed=1).eval().requires_grad_(False)
choose_implementations(config.model, config.moe, gpt)
ready = ReadyModel(gpt, Wordless({VOCABULARY}), config.model, torch.device("cpu"), Path("tiny"), None)
def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = status("VmRSS")
engine = Engine(ready, build_runner(ready), maximum_requests=1)
engine.submit(Request([7] * {PROMPT}, Sampling(), 4, torch.Generator()))
events = []
while engine.busy:
    events += engine.step()
weights = sum(weight.numel() * weight.element_size() for weight in gpt.parameters())
print(len(events), weights, before, status("VmHWM"))
"""


def test_a_prompt_of_4096_tokens_and_a_vocabulary_of_128k_need_less_than_a_gigabyte(repository: Path) -> None:
    """Beside the weights, and with the interpreter and PyTorch. All logits of this prompt alone would be 2.1 GB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc to measure memory")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env={**os.environ, "PYTHONPATH": str(repository)}, capture_output=True, text=True, check=True
    )
    events, weights, before, peak = map(int, done.stdout.split())
    assert events == 4
    assert weights > 4 * VOCABULARY * 128
    assert peak - weights < GIGABYTE
    assert peak - before < GIGABYTE / 4, "the logits of one part of the prompt alone would be 0.5 GB"
