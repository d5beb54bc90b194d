"""Published models as transformers wrote them (the first version 4 that knew them, the last one, today's): in, 3 steps of training, out again.

Layers, widths and vocabulary are cut (`published/models.py`); heads, experts, biases and ends are the published ones. What versions 4 stored lies in
`published/*.json`, written by those versions themselves (`published/make.py`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.convert.dropped import BUFFER
from megatron.convert.from_huggingface import Import, import_model
from megatron.data.indexed import IndexedDatasetWriter
from megatron.data.progress import build_reporter
from tests.convert.published.models import LAST, MODELS
from tests.training.runs import train_losses

RECORDED = [
    pytest.param(file, id=file.stem, marks=[pytest.mark.slow] * file.stem.endswith(LAST))  # the last of the 4 line writes as today's does
    for file in sorted((Path(__file__).parent / "published").glob("*.json"))
]
EXPERTS = [name for name, published in MODELS.items() if "Moe" in published.class_name or "Mixtral" in published.class_name]
TODAY = [
    *(pytest.param((name, True), id=name, marks=pytest.mark.slow) for name in MODELS),  # test_in_and_out.py has every class as it is written today
    *(pytest.param((name, False), id=f"{name}-fused") for name in EXPERTS),
]
ROUTERS = (".mlp.gate.weight", "_moe.gate.weight")
HOW = {"train_iters": 3, "train_micro_batch_size_per_gpu": 2, "log_interval": 1, "seq_length": 16, "num_workers": 0, "precision": "fp32"}
HOW |= {"optimizer": {"type": "Adam", "params": {"lr": 1e-2}}, "split": "1,0,0", "eval_interval": 100, "eval_iters": 0, "checkpoint_factor": 3}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens that the small tokenizer has, in an order that can be learnt."""
    prefix = tmp_path_factory.mktemp("corpus") / "counting"
    with IndexedDatasetWriter(prefix, np.dtype("uint16")) as writer:
        for start in range(40):
            writer.add(np.arange(start, start + 50, dtype=np.uint16))
    return prefix


def recorded_weights(record: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Random weights of the names, shapes and types that a version stored; buffers with what they held."""
    generator = torch.Generator().manual_seed(7)
    for pattern, (shape, dtype) in record["weights"].items():
        count = re.search(r"\{(\d+)\}", pattern)
        for number in range(int(count[1]) if count else 1):
            yield re.sub(r"\{\d+\}", str(number), pattern), _drawn(pattern, shape, getattr(torch, dtype), generator, record["config"])


def _drawn(name: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator, config: dict[str, Any]) -> Tensor:
    if name.endswith("inv_freq"):
        turned = 2 * shape[0]
        return (1.0 / config.get("rotary_emb_base", 10000) ** (torch.arange(0, turned, 2) / turned)).to(dtype)
    if name.endswith("attention.bias"):
        return torch.ones(shape).tril().to(dtype)
    if name.endswith("masked_bias"):
        return torch.tensor(-1e9).to(dtype)
    return (float("norm" in name and name.endswith("weight")) + 0.1 * torch.randn(shape, generator=generator)).to(dtype)


def write_recorded(file: Path, directory: Path) -> None:
    record = json.loads(file.read_text())
    directory.mkdir()
    for name in ("config", "generation_config"):
        if name in record:
            (directory / f"{name}.json").write_text(json.dumps(record[name]))
    weights = dict(recorded_weights(record))
    if record["file"].endswith(".bin"):
        torch.save(weights, directory / record["file"])
    else:
        save_file(weights, directory / record["file"], {"format": "pt"})


def write_today(name: str, directory: Path, *, original_format: bool) -> None:
    kind = getattr(transformers, MODELS[name].class_name)
    model = kind(kind.config_class(**MODELS[name].settings)).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(7)
    for parameter_name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(float("norm" in parameter_name) * (tensor.ndim == 1) + 0.1 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(directory, save_original_format=original_format)


def stored(directory: Path) -> dict[str, Tensor]:
    """What a directory holds, without the buffers that old versions stored."""
    file = directory / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True) if file.exists() else load_file(directory / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if not BUFFER.search(name)}


def without_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An export writes the experts one by one, and Mixtral's router beside them under its older name."""
    return {name: tensor for name, tensor in weights.items() if ".experts." not in name and not name.endswith(ROUTERS)}


def shapes(directory: Path) -> dict[str, list[int]]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def there_and_back(theirs: Path, name: str, tmp_path: Path, corpus: Path, export: Any) -> None:
    imported = import_model(Import(theirs, tmp_path / "run"), build_reporter())
    assert imported.class_name == MODELS[name].class_name
    assert imported.compared is not None
    exported = export(tmp_path / "run", tmp_path / "untrained")
    before, after = stored(theirs), stored(tmp_path / "untrained")
    if any("gate_up_proj" in key for key in before):
        before, after = (without_experts(weights) for weights in (before, after))
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert exported.class_name == MODELS[name].class_name

    keys = yaml.safe_load((tmp_path / "run" / "config.yml").read_text())
    losses = train_losses({**keys, **HOW, "data_path": str(corpus), "save": str(tmp_path / "trained")})
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    again = export(tmp_path / "trained", tmp_path / "after")
    assert again.class_name == MODELS[name].class_name
    assert shapes(tmp_path / "after") == shapes(tmp_path / "untrained")


@pytest.mark.parametrize("file", RECORDED)
def test_as_written_by_transformers_4(file: Path, tmp_path: Path, corpus: Path, tokenizer_file: Path, export: Any) -> None:
    write_recorded(file, tmp_path / "theirs")
    shutil.copy(tokenizer_file, tmp_path / "theirs")
    there_and_back(tmp_path / "theirs", file.stem.rsplit("-", 1)[0], tmp_path, corpus, export)


@pytest.mark.parametrize("case", TODAY)
def test_as_written_today(case: tuple[str, bool], tmp_path: Path, corpus: Path, tokenizer_file: Path, export: Any) -> None:
    name, original_format = case
    write_today(name, tmp_path / "theirs", original_format=original_format)
    shutil.copy(tokenizer_file, tmp_path / "theirs")
    there_and_back(tmp_path / "theirs", name, tmp_path, corpus, export)
