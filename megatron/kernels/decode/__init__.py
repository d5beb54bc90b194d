"""Decoding: the parts of a layer for a few rows, each the newest token of a text of its own. Every matrix is read once, as it lies in memory.

Shapes: N rows; K columns and O rows of a matrix; D model width; F hidden width; E experts; C candidates, of which k are chosen; M LoREs of an expert
of rank Q, of which L are chosen; H query heads and G key/value heads of d numbers; P positions of a cache.

Rows are float32, whatever the format of the matrices: float32, bfloat16, or int8 with a float32 scale for each row. A row that
int8 weights multiply is rounded to 16 bits first: its products are whole numbers and their sums exact. Nothing here has a gradient.

interface.py   what each part consists of      reference.py   the definition, by PyTorch      compiled.py   by csrc/decode_*, on a CPU
quantize.py    int8 weights
"""

from __future__ import annotations

import importlib
from types import ModuleType

from megatron.kernels.compiled import implementation
from megatron.kernels.registry import Implementation, Op


def _compiled() -> ModuleType:
    return importlib.import_module("megatron.kernels.decode.compiled")


def _reference() -> ModuleType:
    return importlib.import_module("megatron.kernels.decode.reference")


OP: Op[ModuleType] = Op("decode")
OP.register(implementation(_compiled))
OP.register(Implementation("reference", frozenset({"cpu", "cuda"}), lambda: None, _reference))  # a model then uses its own forward
