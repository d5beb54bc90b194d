"""Writes what a version of transformers 4 stores for the models of models.py: config.json, file and names, shapes and types of the weights.

    pip install --no-deps --target OLD transformers==4.24.0 tokenizers==0.13.3 huggingface_hub==0.11.1
    PYTHONPATH=OLD:. .venv/bin/python tests/convert/published/make.py

Numbers of experts are collapsed: `experts.{60}.up_proj` stands for 60 names.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS

HERE = Path(__file__).parent


def stored(directory: Path) -> tuple[str, dict[str, Any]]:
    """The file with the weights, and what is in it."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).exists():
            if name.endswith("bin"):
                return name, torch.load(directory / name, weights_only=True)
            from safetensors.torch import load_file

            return name, load_file(directory / name)
    raise FileNotFoundError(directory)


def described(weights: dict[str, Any]) -> dict[str, list[Any]]:
    """Name with collapsed experts -> [shape, type]."""
    counts: dict[str, int] = {}
    result: dict[str, list[Any]] = {}
    for name, tensor in weights.items():
        pattern = re.sub(r"experts\.\d+\.", "experts.{}.", name)
        counts[pattern] = counts.get(pattern, 0) + 1
        result[pattern] = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
    return {pattern.replace("{}", f"{{{counts[pattern]}}}"): entry for pattern, entry in result.items()}


def compact(content: dict[str, Any]) -> str:
    """JSON with one line for each weight."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\s+\[\s+([\d,\s]+?)\s+\],\s+(\"\w+\")\s+\]", lambda m: f"[[{' '.join(m[1].split())}], {m[2]}]", text) + "\n"


def main() -> None:
    for name, published in MODELS.items():
        if transformers.__version__ not in published.versions:
            continue
        kind = getattr(transformers, published.class_name)
        model = kind(kind.config_class(**published.settings)).to(torch.float16 if name.startswith("pythia") else torch.bfloat16)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            file, weights = stored(Path(directory))
            config = json.loads((Path(directory) / "config.json").read_text())
            generation = Path(directory) / "generation_config.json"
            content = {"config": config, "file": file, "weights": described(weights)}
            if generation.exists():
                content["generation_config"] = json.loads(generation.read_text())
        (HERE / f"{name}-{transformers.__version__}.json").write_text(compact(content))
        print(name, transformers.__version__, file, len(weights))


if __name__ == "__main__":
    main()
