"""What these tests share: data of a few tasks, a tokenizer, and tiny models with lively random weights as checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.data.tokenizer import build_tokenizer
from megatron.testing.tiny import TINY_MOE, TINY_STRUCTMOE, tiny_config
from tests.inference.conftest import build_ready, write_checkpoint
from tests.inference.harness.local_data import TEXT, write_data

MODELS = {
    "mixtral": {
        **TINY_MOE,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "num_kv_heads": 2,
        "use_bias_in_attn_linear": False,
        "intermediate_size": 96,
    },
    "structmoe": dict(TINY_STRUCTMOE),
}


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The keys of a checkpoint of one of MODELS with this tokenizer.json. Its weights are so large that answers differ."""

    def make(kind: str, tokenizer: Path, **keys: Any) -> dict[str, Any]:
        sizes = {"seq_length": 128, "max_position_embeddings": 128, "init_method_std": 0.3, "make_vocab_size_divisible_by": 1}
        values = {**MODELS[kind], **sizes, "tokenizer_type": "HFTokenizer", "vocab_file": str(tokenizer), **keys}
        config = tiny_config(values)
        folder = tmp_path_factory.mktemp(kind)
        write_checkpoint(folder, config, build_ready(config, build_tokenizer(config.data)).gpt)
        return {**values, "load": str(folder)}

    return make


@pytest.fixture(scope="session")
def structmoe(checkpoint_of: Callable[..., dict[str, Any]], small_tokenizer: Path, task_data: Path) -> dict[str, Any]:
    """A StructMoE and the data of the tasks."""
    return {**checkpoint_of("structmoe", small_tokenizer), "eval_data": str(task_data)}
