"""Data of four tasks of the harness, in folders named as on the hub: a few rows each, written by us in the hub's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.config.neox import NeoXConfig
from megatron.data.progress import Reporter, build_reporter
from megatron.inference.harness.forward import ReadyForward
from megatron.inference.harness.run import Model, run_tasks, whole_window
from megatron.inference.harness.tasks import load_tasks
from megatron.inference.model import load_ready_model
from megatron.inference.runner import build_runner
from megatron.testing.tiny import tiny_config

ROWS = 12
THINGS = ("river", "mountain", "garden", "engine", "letter", "window", "market", "winter", "harbor", "teacher", "bridge", "forest")
VERBS = ("carries", "opens", "follows", "covers", "reaches", "holds")
TEXT = " ".join(f"The {a} {VERBS[i % 6]} the {b}. Question: what does it do? Answer: no, yes." for i, a in enumerate(THINGS) for b in THINGS)
"""What the small tokenizers of these tests learn from."""


def write_data(folder: Path) -> Path:
    """arc_easy, lambada_openai, wikitext and boolq, `ROWS` documents each (3 for wikitext)."""
    number = range(ROWS)
    answers = [[THINGS[(i + 1) % 12], f"a {THINGS[(i + 5) % 12]} in winter", THINGS[(i + 7) % 12], "nothing"] for i in number]
    arc = [
        {
            "id": str(i),
            "question": f"What {VERBS[i % 6]} the {THINGS[i]}?",
            "choices": {"text": answers[i], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in number
    ]
    lambada = [{"text": f"The {THINGS[i]} {VERBS[i % 6]} the old {THINGS[(i + 3) % 12]} and then the {THINGS[(i * 5 + 1) % 12]}"} for i in number]
    pages = [{"page": " ".join(f"The {THINGS[(i + j) % 12]} {VERBS[j % 6]} the {THINGS[j % 12]} ." for j in range(20))} for i in range(3)]
    boolq = [{"idx": i, "passage": f"A {THINGS[i]} {VERBS[i % 6]} it.", "question": f"is it a {THINGS[i]}", "label": i % 2} for i in number]
    hub(folder, "allenai/ai2_arc", "ARC-Easy", {"train": arc[:2], "validation": arc, "test": arc})
    hub(folder, "EleutherAI/lambada_openai", "default", {"test": lambada})
    hub(folder, "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", {"train": pages, "validation": pages, "test": pages})
    hub(folder, "aps/super_glue", "boolq", {"train": boolq[:2], "validation": boolq})
    return folder


def hub(folder: Path, repository: str, name: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A data set as JSON lines, with the card that names its files."""
    place = folder / repository / name
    place.mkdir(parents=True)
    files = "".join(f"  - split: {split}\n    path: {name}/{split}.jsonl\n" for split in splits)
    (folder / repository / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n")
    for split, rows in splits.items():
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(values: Mapping[str, Any], reporter: Reporter | None = None) -> dict[str, Any]:
    """The harness's results for a checkpoint, in this process."""
    config: NeoXConfig = tiny_config(values)
    ready = whole_window(load_ready_model(config))
    with torch.inference_mode():
        model = Model(ready, build_runner(ready), ReadyForward(ready))
        return run_tasks(config, load_tasks(config.evaluation), model, reporter or build_reporter(quiet=True))
