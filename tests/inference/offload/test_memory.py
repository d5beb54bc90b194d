"""Memory: a budget is kept by a process whose experts are four times as large, and one that is too small is refused with what would do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.layout import tag
from megatron.checkpoint.save import resolved_config_document
from megatron.config import config_from_dict
from megatron.config.expert_offload import bytes_of
from megatron.config.size import padded_vocab_size
from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.inference.offload.budget import Need, slots_for
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.packed import header, header_length, outline
from megatron.inference.offload.units import EMPTY, fingerprint, moe_layers, units_of
from megatron.model.gpt import GPT
from megatron.training.setup import checkpoint_args
from tests.inference.offload.conftest import load

BUDGET = 500_000_000
LARGE = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "use_bias_in_attn_linear": False,
    "precision": "bfloat16",
    "no_weight_tying": True,
    "tokenizer_type": "CharLevelTokenizer",
    "moe_num_experts": 80,
    "moe_top_k": 2,
    "moe_router_type": "topk",
    "moe_ffn_hidden_size": 1024,
}


def write_large(folder: Path) -> tuple[dict[str, Any], int]:
    """A model whose experts are zeros: they lie in a packed file with holes, which takes no room on the disk. (its keys, bytes of its experts)"""
    config = config_from_dict(LARGE)
    vocabulary = padded_vocab_size(CharLevelTokenizer().vocab_size, config.model.make_vocab_size_divisible_by)
    gpt = GPT(config.model, config.moe, vocabulary, EMPTY)
    experts = {f"sequential.{2 + n}.mlp.experts.{name}" for n, part in moe_layers(gpt).items() for name, _ in part.experts.named_parameters()}
    torch.manual_seed(0)
    state = {}
    for name, tensor in gpt.state_dict().items():
        zero = torch.zeros(1, dtype=torch.bfloat16).expand(tensor.shape)
        state[name] = zero if name in experts else torch.randn(tensor.shape).mul_(0.3).to(torch.bfloat16)
    path = folder / "run" / tag(1)
    (path / "configs").mkdir(parents=True)
    torch.save(
        {"module": state, "dp_world_size": 1, "iteration": 1, "args": checkpoint_args(config, vocabulary)}, path / "mp_rank_00_model_states.pt"
    )
    for name, text in resolved_config_document(config.flat()).items():
        (path / "configs" / name).write_text(text)
    (folder / "run" / "latest").write_text(path.name)
    units = units_of(config, vocabulary, granularity="expert")
    layers = outline(units, torch.bfloat16)
    length = header_length(layers)
    record = sum(torch.Size(part.shape).numel() * 2 for part in layers[0].parts)
    sums = {str(layer.layer): [zlib.crc32(bytes(record))] * layer.units for layer in layers}
    with (folder / "experts.packed").open("wb") as file:
        file.write(header(layers, sums, length, of=fingerprint(state.__getitem__, units)))
        file.truncate(length + sum(layer.stride * layer.units for layer in layers))
    return {**LARGE, "load": str(folder / "run")}, record * 80 * 8


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int, Path]:
    folder = tmp_path_factory.mktemp("large")
    return *write_large(folder), folder / "experts.packed"


def test_experts_of_four_times_the_budget(large: tuple[dict[str, Any], int, Path], repository: Path, record_property: Any) -> None:
    keys, size, packed = large
    assert size >= 4 * BUDGET
    keys = {**keys, "expert_offload": {"memory": f"{BUDGET // 10**6}MB", "store": str(packed), "prefetch": True, "policy": "lfu"}}
    work = [sys.executable, str(repository / "tests/inference/offload/memory_work.py"), json.dumps(keys)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    finished = subprocess.run(work, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    result = json.loads(finished.stdout.splitlines()[-1])
    record_property("peak", result["peak"])
    assert result["peak"] < 1.15 * BUDGET
    assert result["slots"] >= 4
    assert result["replacements"] > 100  # far more experts went through the slots than fit


def test_a_budget_that_is_too_small(large: tuple[dict[str, Any], int, Path]) -> None:
    keys, _, packed = large
    with pytest.raises(OffloadError, match=r"memory: 60,000,000 bytes leave room for 0 experts .* and one token needs 2\. .* Give at least \d+MB\."):
        load(keys, memory="60MB", store=str(packed))


def test_slots_of_a_budget() -> None:
    work = 48 * 2**20
    need = Need(taken=1000, cache=100, reading=10, slot=50)
    assert slots_for(work + 1110 + 149, need, fewest=2, most=8) == 2
    assert slots_for(work + 10**6, need, fewest=2, most=8) == 8
    with pytest.raises(OffloadError, match="room for 1 experts"):
        slots_for(work + 1110 + 99, need, fewest=2, most=8)


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("7kb", 7000), ("2", None), ("GB", None), ("2 GBs", None)])
def test_sizes(text: str, size: int | None) -> None:
    assert bytes_of(text) == size
