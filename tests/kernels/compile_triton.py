"""Run by `test_triton.py`: compiles what the Triton implementations launch, ahead of time, and prints a line for each kernel. No GPU is needed.

`python tests/kernels/compile_triton.py bfloat16 80 90`. The implementations run on CPU tensors with a launch that only records its arguments.
Exit status 1 if a kernel does not compile, or puts registers into memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron.kernels import permute as perm
from megatron.kernels.grouped_lore.interface import HiddenLayer, LoreChoice, Projection
from megatron.kernels.route.interface import Gradients, Saved, Selection
from megatron.kernels.triton_kernels import blocks

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32"}
READER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ALIGNED = [["tt.divisibility", 16]]


class Launch(NamedTuple):
    """A kernel with everything that its machine code depends on."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], Any]
    options: dict[str, int]


RECORDED: dict[str, Launch] = {}


def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """As `blocks.launch`, with Triton's own rules: 1 is a constant, multiples of 16 are known to be."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    found = Launch(kernel, {}, {}, {}, options)
    for place, (name, given) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(given, Tensor):
            found.signature[name] = f"*{TYPES[given.dtype]}"
        elif isinstance(given, float):
            found.signature[name] = "fp32"
            continue
        elif given == 1:
            found.signature[name], found.constants[(place,)] = "constexpr", 1
            continue
        else:
            found.signature[name] = "i32" if abs(given) < 2**31 else "i64"
        if isinstance(given, Tensor) or given % 16 == 0:
            found.attributes[(place,)] = ALIGNED
    for name, value in constants.items():
        found.signature[name], found.constants[(kernel.arg_names.index(name),)] = "constexpr", value
    RECORDED[f"{kernel.__name__} {found[1:]}"] = found


def hidden_layer(implementation: Any, dtype: torch.dtype, choices: int | None, gated: bool, activation: str) -> None:
    """Forward and backward at a shape of which every dimension is a multiple of 16."""
    experts, lores_each, rank, width, columns, rows = 4, 4, 64, 256, 512, 1024
    lores = experts if choices is None else experts * lores_each
    weight, bias = torch.zeros(experts, columns, width, dtype=dtype), torch.zeros(experts, columns, dtype=dtype)
    projection = Projection(weight, torch.zeros(lores, rank, width, dtype=dtype), torch.zeros(lores, rank, columns, dtype=dtype), bias)
    choice = None
    if choices is not None:
        key = (torch.arange(rows) // (rows // experts) * lores_each)[:, None] + torch.arange(choices)
        choice = LoreChoice(torch.zeros(rows, choices), perm.sort_by_group(key, lores, backend="reference"))
    x = torch.zeros(rows, width, dtype=dtype)
    layer = HiddenLayer(torch.full((experts,), rows // experts), activation, projection, projection if gated else None, choice)
    hidden, saved = implementation.forward(x, layer, save=True)
    implementation.backward(hidden, x, layer, saved)


class Unsorted:
    """Nothing ran, so there are no keys to sort."""

    def sort(self, key_NK: Tensor, num_groups: int, *, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
        return key_NK.flatten(), key_NK, key_NK.new_zeros(num_groups)


def routing(implementation: Any, sizes: list[tuple[int, int, bool]]) -> None:
    """Candidates, choices, and whether weights are normalised. Routers compute in float32, whatever the model's dtype is."""
    for candidates, top_k, normalize in sizes:
        logit, rows_P, selection = torch.zeros(1024, candidates), torch.full((4,), 256), Selection(top_k, normalize)
        routed = implementation.forward(logit, rows_P, selection, allow_nan=True)
        grads = Gradients(routed.weight_NK, routed.probability_NC, routed.logsumexp_N, routed.total_PC)
        implementation.backward(grads, Saved(routed.probability_NC, torch.zeros_like(routed.choice_NK), rows_P), selection)


def record_all(dtype: torch.dtype, quick: bool) -> None:
    """`quick`: one StructMoE layer only."""
    blocks.launch = record
    from megatron.kernels.grouped_gemm.triton import Triton as Gemm
    from megatron.kernels.grouped_lore.triton import Triton as Lore
    from megatron.kernels.permute.triton import Triton as Permute
    from megatron.kernels.route import triton as route

    route.Permutation = Unsorted  # type: ignore[assignment, misc]
    hidden_layer(Lore(), dtype, 1, False, "gelu")
    routing(route.Triton(), [(32, 1, False)] if quick else [(8, 2, True), (32, 1, False), (64, 8, True), (257, 3, True)])
    if quick:
        return
    hidden_layer(Lore(), dtype, 2, True, "silu")
    hidden_layer(Lore(), dtype, None, True, "mish")
    for activation in ("gelu_tanh", "relu", "sigmoid", "softsign"):
        hidden_layer(Lore(), dtype, 1, True, activation)
    x, counts = torch.zeros(1024, 256, dtype=dtype), torch.full((4,), 256)
    Gemm().outer(x, Gemm().matmul(x, torch.zeros(4, 512, 256, dtype=dtype), counts, transposed=True), counts)
    order, weight = perm.sort_by_group(torch.zeros(1024, 2, dtype=torch.int64), 1, backend="reference"), torch.zeros(1024, 2)
    rows = Permute().gather(x, order.order_R, 2)
    for each in (None, weight):
        Permute().combine(rows, order.inverse_TK, each)
    Permute().combine_backward(x, rows.zero_(), order.order_R, weight)


def compile_one(launch: Launch, capability: int) -> tuple[str, int]:
    """(resources in words, bytes of stack: 0 unless registers are put into memory)."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        report = subprocess.run([os.fspath(READER), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return f"{found[1]} registers, {made.metadata.shared} bytes shared, {found[2]} bytes stack", int(found[2])


def main() -> int:
    """Arguments: dtype, compute capabilities, and perhaps `quick`."""
    record_all(getattr(torch, sys.argv[1]), "quick" in sys.argv)
    failed = False
    for launch in RECORDED.values():
        for capability in (int(word) for word in sys.argv[2:] if word.isdigit()):
            words, stack = compile_one(launch, capability)
            failed |= stack > 0
            print(f"{launch.kernel.__name__} sm_{capability} {launch.options}: {words}", flush=True)
    print(f"compiled {len(RECORDED)} kernels")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
