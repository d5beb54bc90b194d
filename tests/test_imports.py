"""Importing is free: no network, no other process, no GPU, no optional package; and a layer never loads one further right.

Each test starts one fresh interpreter, because what this one has imported already proves nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.test_code_shape import LAST_RANK_SEEN_BY, LAYERS, RANK

# Nothing that training needs: each of these is imported by the function that uses it.
OPTIONAL = [
    "wandb",
    "tensorboard",
    "comet_ml",
    "transformers",
    "matplotlib",
    "plotly",
    "datasets",
    "lm_eval",
    "accelerate",
    "peft",
    "megablocks",
    "deep_ep",
    "flash_attn",
    "apex",
    "triton",
    "zstandard",
    "tiktoken",
    "ftfy",
]

# Code that is copied into exports and run by transformers there. Whoever needs it here imports it inside a function.
NEEDS_TRANSFORMERS = "megatron.convert.huggingface."

# The class that lm-evaluation-harness calls; the function that runs tasks imports it.
NEEDS_LM_EVAL = "megatron.inference.harness.language_model"

# Kernels in Triton. `Implementation.make` imports them once they are chosen; the package around them is free of Triton.
NEEDS_TRITON = re.compile(r"megatron\.kernels\.(\w+\.triton|triton_kernels\.(activations|grouped|hidden|products|routing|rows))")

# In the fresh interpreter: an optional package is absent, and whoever connects or starts a process gets an error that names the attempt.
GUARD = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (kept away by the test)", name=name)

sys.meta_path.insert(0, Absent())

FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn")
attempts = []

def watch(event, arguments):
    if event in FORBIDDEN:
        attempts.append(f"{{event}} {{arguments[:2]}}")
        raise PermissionError(f"{{event}} while importing")

sys.addaudithook(watch)
import importlib

def load(name):
    before = len(attempts)
    try:
        importlib.import_module(name)
    except Exception as error:
        sys.exit(f"{{name}}: {{type(error).__name__}}: {{error}}")
    if attempts[before:]:
        sys.exit(f"{{name}}: importing it did {{attempts[before:]}}")
"""


def run_in_fresh_interpreter(program: str, repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", GUARD + program]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert finished.returncode == 0, f"{finished.stderr[-3000:]}\n{finished.stdout[-1000:]}"


def modules_of(repository: Path) -> list[str]:
    """Every module of the package by its dotted name, leftmost layer first."""
    package = repository / "megatron"
    names = []
    for path in package.rglob("*.py"):
        parts = ("megatron", *path.relative_to(package).with_suffix("").parts)
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names, key=lambda name: (layer_rank(name), name))


def layer_rank(module: str) -> int:
    parts = module.split(".")
    return RANK[parts[1]] if len(parts) > 1 else -1


def test_no_import_reaches_outside_and_no_layer_loads_one_to_its_right(repository: Path) -> None:
    """One interpreter imports everything from left to right; after each layer nothing further right may have been loaded."""
    modules = [
        name
        for name in modules_of(repository)
        if name != NEEDS_LM_EVAL and not name.startswith(NEEDS_TRANSFORMERS) and not NEEDS_TRITON.fullmatch(name)
    ]
    expected = [(name, sorted(further_right(name))) for name in modules]
    program = f"""
for name, right in {expected!r}:
    load(name)
    loaded = [layer for layer in right if f"megatron.{{layer}}" in sys.modules]
    if loaded:
        sys.exit(f"{{name}}: importing it loaded {{loaded}}, which is not to its left")
import torch
if torch.cuda.is_initialized():
    sys.exit("importing the package initialised CUDA")
"""
    run_in_fresh_interpreter(program, repository)


def further_right(module: str) -> set[str]:
    """The layers that importing `module`, after everything to its left, must not have loaded."""
    layer = module.split(".")[1] if "." in module else ""
    allowed = max(LAST_RANK_SEEN_BY.get(layer, -1), layer_rank(module))
    return {name for rank, names in enumerate(LAYERS) for name in names if rank > allowed}


def test_the_package_and_its_configuration_load_nothing_heavy(repository: Path) -> None:
    modules = [name for name in modules_of(repository) if name == "megatron" or name.startswith("megatron.config")]
    program = f"""
for name in {modules!r}:
    load(name)
    heavy = [package for package in ("torch", "deepspeed", "numpy", "tokenizers", "safetensors", "pandas") if package in sys.modules]
    if heavy:
        sys.exit(f"{{name}}: importing it loaded {{heavy}}")
"""
    run_in_fresh_interpreter(program, repository)


def test_the_guard_sees_a_process_and_an_optional_package(repository: Path) -> None:
    program = """
import subprocess
for action, expected in [(lambda: subprocess.run(["true"]), PermissionError), (lambda: importlib.import_module("wandb"), ModuleNotFoundError)]:
    try:
        action()
    except expected:
        continue
    sys.exit(f"the guard let something through that should have raised {expected.__name__}")
"""
    run_in_fresh_interpreter(program, repository)
