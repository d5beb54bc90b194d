"""GPT-NeoX's model files with the layouts that they ask for: they load, and made small they train in several processes as in one.

The layouts are those of the files in EleutherAI/gpt-neox. The files here have the same models under the names of the second column, for any layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron.config.loader import load_config
from megatron.testing.distributed import run_distributed
from tests.configs.test_shipped import CONFIGS, load
from tests.configs.test_training import SMALL
from tests.training.runs import losses_of


class Upstream(NamedTuple):
    """A file of GPT-NeoX: ours with the same model, its layout, and the settings that are in no file of ours."""

    ours: str
    pipe: int
    tensor: int
    settings: tuple[str, ...] = ()


RECOMPUTED = ("checkpoint_activations=true", "checkpoint_num_layers=1", "partition_activations=true", "synchronize_each_layer=true")
FILES = {
    "pythia/6-9B.yml": Upstream("pythia/6.9B.yml", 1, 2, RECOMPUTED),
    "pythia/12B.yml": Upstream("pythia/12B.yml", 1, 4, RECOMPUTED),
    "20B.yml": Upstream("20B.yml", 4, 2, (*RECOMPUTED[:2], "save_interval=500", "zero_optimization.stage=1")),
    "llama/13B.yml": Upstream("llama/13B.yml", 1, 2),
    "llama/30B.yml": Upstream("llama/30B.yml", 1, 4),
    "llama/65B.yml": Upstream("llama/65B.yml", 1, 8),
    "llama2/13B.yml": Upstream("llama2/13B.yml", 1, 2),
    "finetuning_configs/6-9B.yml": Upstream("pythia/6.9B.yml", 1, 2, (*RECOMPUTED, "finetune=true", "load=checkpoints")),
    "post-training/configs/llama3-8b-sft.yml": Upstream("llama3/8B.yml", 0, 4, (*RECOMPUTED, "fp32_allreduce=true", "pack_impl=packed")),
    "125M-dmoe.yml": Upstream("125M-dmoe.yml", 2, 2, (*RECOMPUTED, "fp32_allreduce=true")),
}


def _layout(pipe: int, tensor: int) -> dict[str, int]:
    return {"pipe_parallel_size": pipe, "model_parallel_size": tensor}


@pytest.mark.parametrize("name", FILES)
def test_a_file_loads_with_its_own_layout(name: str) -> None:
    file = FILES[name]
    given = load(file.ours).config.given()
    layout = [f"{key}={value}" for key, value in _layout(file.pipe, file.tensor).items()]
    added = [setting for setting in file.settings if setting.split("=")[0] not in given]
    config = load_config([file.ours], [*layout, *added], CONFIGS).config
    assert (config.parallel.pipe_parallel_size, config.parallel.model_parallel_size) == (file.pipe, file.tensor)


# ---------------------------------------------------------------- made small, they train

ARCHITECTURES = ["19M.yml", "pythia/14M.yml", "llama/7B.yml", "llama2/70B.yml", "mistral/7B.yml", "125M-dmoe.yml"]
"""One file of GPT-NeoX for each architecture."""
LAYOUTS = {"DP2": _layout(0, 1), "TP2": _layout(0, 2), "PP2": _layout(2, 1)}
STEPS = 3
TOGETHER = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "null", "train_iters": STEPS}


def train_small(name: str, layout: Mapping[str, int], corpus: Path, metrics: Path) -> list[float]:
    """The losses of a few steps of the file's model with two small layers, in fp32."""
    from megatron.training.run import train

    given = load(name).config.given()
    values: dict[str, Any] = {key: value for key, value in SMALL.items() if key in given} | TOGETHER | dict(layout)
    values |= {"data_path": corpus, "tokenizer_type": "CharLevelTokenizer", "num_workers": 0, "eval_iters": 0, "metrics_file": metrics}
    values |= {key: "null" for key in given if key in ("vocab_file", "save") or key.endswith(("_data_paths", "_data_weights"))}
    values |= {key: "false" for key in ("fp16.enabled", "bf16.enabled", "resume_if_exists") if key.split(".")[0] in given}
    values |= {"precision": "fp32", "zero_optimization.stage": 1}  # a pipeline divides nothing more than the optimizer state
    train(load_config([name], [f"{key}={value}" for key, value in values.items()], CONFIGS))
    return losses_of(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_processes_train_a_small_one_as_one_does(name: str, layout: str, corpus: Path, tmp_path: Path) -> None:
    one = train_small(name, LAYOUTS["DP2"], corpus, tmp_path / "one.jsonl")
    found = run_distributed(train_small, 2, name, LAYOUTS[layout], corpus, tmp_path / "two.jsonl", backend=None)
    assert len(one) == STEPS
    assert all(loss < 7 for loss in one), "about ln 512 at the start"
    for losses in found:
        assert losses == pytest.approx(one, abs=1e-4)
