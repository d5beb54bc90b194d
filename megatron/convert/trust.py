"""Whose code runs when a folder of Hugging Face's is loaded: transformers' own and this version's. A folder's own code runs only with consent."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.convert.architecture import Architecture
from megatron.convert.json_files import read_json, write_json
from megatron.convert.tensor_files import StoredTensors

OPTION = "--trust-remote-code"
CODE_FOR = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
"""Entries of `auto_map` that name code for a language model; others (tokenizers, classifiers) are not loaded here."""
RUNS_CODE = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation", "quantization_config")
"""Beginnings of settings of config.json with which transformers runs code of the folder, or fetches kernels from the hub and runs those."""
OUTPUTS = ("return_dict", "output_hidden_states", "output_attentions", "output_router_logits")
"""Settings of what a model returns beside its logits, which the comparison does not need."""
CLASS = "AutoModelForCausalLM"


def foreign_code(directory: Path, architecture: Architecture) -> str | None:
    """What in the folder asks for code that is not ours, as the first half of a sentence that names the file. None: nothing does.

    Files of our own code are compared byte for byte with what this version writes.
    """
    config = directory / "config.json"
    auto_map, code = read_json(config).get("auto_map"), architecture.code
    known = None if code is None else code.auto_map
    wanted = {key: auto_map[key] for key in CODE_FOR if auto_map.get(key)} if isinstance(auto_map, dict) else auto_map
    if wanted and (known is None or not isinstance(wanted, dict) or any(known.get(key) != name for key, name in wanted.items())):
        first = next(iter(wanted.values())) if isinstance(wanted, dict) else wanted
        return f"{config} names Python code for the model (auto_map: {first})"
    for file in () if code is None else code.files:
        copy = directory / file.name
        if copy.exists() and (not copy.is_file() or copy.read_bytes() != file.read_bytes()):
            return f"{copy} differs from the file of that name that this version writes"
    return None


def refusal(found: str, architecture: Architecture) -> str:
    """`found` (of foreign_code) as an error message."""
    return (
        f"{found}. Code of an imported folder does not run without your consent. If you have read this code and trust it, add {OPTION}. "
        f"With --skip-check this code does not run, and the weights are read as those of {architecture.class_name}."
    )


@contextmanager
def without_code(stored: StoredTensors) -> Iterator[Path]:
    """A temporary folder with the same weights and a config.json that asks for no code and no other output. Nothing else of the folder is in it."""
    with tempfile.TemporaryDirectory(prefix="without-code-") as name:
        folder = Path(name)
        for file in set(stored.index.values()):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to((stored.directory / file).resolve())
        if stored.index_name is not None:
            write_json(folder / stored.index_name, {"metadata": {}, "weight_map": stored.index})
        settings = read_json(stored.directory / "config.json")
        write_json(folder / "config.json", {key: value for key, value in settings.items() if not key.startswith((*RUNS_CODE, *OUTPUTS))})
        yield folder


def own_class(architecture: Architecture) -> Any:
    """What loads a model of this architecture without code of a folder: transformers' class, or ours as it lies in this package."""
    if architecture.code is None:
        import transformers

        return getattr(transformers, architecture.class_name)
    module, name = architecture.code.auto_map[CLASS].split(".")
    return getattr(importlib.import_module(f"megatron.convert.huggingface.{module}"), name)
