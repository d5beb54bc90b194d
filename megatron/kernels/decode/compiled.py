"""The same parts by csrc/decode_*: each is checked and handed over once, and a call passes addresses. On CPUs alone.

Shapes as in the package's docstring. Every class keeps its tensors alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.kernels.activations import ACTIVATIONS
from megatron.kernels.compiled import DTYPES, address, addresses, built
from megatron.kernels.decode import interface
from megatron.kernels.decode.interface import KINDS, Choice, Input, Matrix, Projection, Routed

INT8 = 3
"""csrc's number of the format, beside those of `DTYPES`."""
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
NO_CHOICE = Choice(1, 1)
NO_PROJECTION = [0] * 10


class FormatNotServed(ValueError):
    """A weight of a format that the compiled code does not read."""


def _format(matrix: Matrix) -> int:
    weight, scale = matrix
    if weight.device.type != "cpu" or not weight.is_contiguous():
        raise FormatNotServed(f"weights must be contiguous on the CPU, not on {weight.device}")
    if (weight.dtype == torch.int8) != (scale is not None):
        raise FormatNotServed("int8 weights, and no others, need a scale for each row")
    if weight.dtype == torch.int8:
        return INT8
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise FormatNotServed(f"weights of {weight.dtype} are not served; float32, bfloat16 and int8 are")
    return DTYPES[weight.dtype]


def _float(*tensors: Tensor | None) -> list[int]:
    for tensor in tensors:
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise FormatNotServed(f"scales and biases must be contiguous float32, not {tensor.dtype}")
    return addresses(*tensors)


def _kind(given: Input) -> list[int]:
    return [KINDS.index(given.kind), NUMBERS[given.activation]]


class Linear:
    """y = input(x) W^T + bias."""

    def __init__(self, part: interface.Linear) -> None:
        self.part, (self.rows, columns) = part, part.matrix.weight.shape
        weights = [address(part.matrix.weight), *_float(part.matrix.scale, part.bias)]
        norm = _float(part.input.scale, part.input.shift)
        self._run = built().DecodeLinear(weights, [_format(part.matrix), self.rows, columns], norm, _kind(part.input), part.input.epsilon).run

    def __call__(self, x_NK: Tensor, y_NO: Tensor, threads: int, *, add: bool = False) -> None:
        """y = the product; `add`: y += it. Both are contiguous float32."""
        self._run(x_NK.data_ptr(), y_NO.data_ptr(), x_NK.shape[0], add, threads)


class Experts:
    """The chosen experts of input(x), added to a residual."""

    def __init__(self, part: interface.Experts) -> None:
        self.part = part
        down, up, lores = part.down, part.up, part.lores
        width = (down.matrix if down.left is None else down.left).weight.shape[1]
        if part.gate is not None and _format(part.gate.matrix) != _format(up.matrix):
            raise FormatNotServed("the projections of an expert must have one format")
        hidden = len(up.matrix.weight) // part.num_experts
        lores_of = (0, 0) if lores is None else (lores.choice.candidates, lores.rank)
        routers = [_router(part.router, part.choice), _router(None if lores is None else lores.router, None)]
        formats = [
            _format(up.matrix),
            *(0 if matrix is None else _format(matrix) for matrix in (part.router, None if lores is None else lores.router)),
        ]
        rules = [part.choice, NO_CHOICE if lores is None else lores.choice]
        self._run = (
            built()
            .DecodeExperts(
                [_projection(up), _projection(part.gate), _projection(down)],
                [part.num_experts, width, hidden, part.rank, *lores_of, *formats, NUMBERS[part.activation]],
                routers,
                [[rule.candidates, rule.chosen, rule.sigmoid, rule.normalize] for rule in rules],
                [rules[0].scale, rules[1].scale, part.input.epsilon],
                _float(part.input.scale, part.input.shift),
                _kind(part.input),
            )
            .run
        )

    def route(self, x_ND: Tensor, routed: Routed, threads: int) -> None:
        """Writes the experts of each row and their weights into `routed`."""
        self._run([x_ND.data_ptr(), 0, 0, *addresses(*routed[:2]), 0, 0], x_ND.shape[0], True, False, threads)

    def __call__(self, x_ND: Tensor, residual_ND: Tensor, y_ND: Tensor, routed: Routed, threads: int) -> None:
        """Routes as well, and y = residual + the experts' weighted results."""
        self._run([*addresses(x_ND, residual_ND, y_ND, *routed[:2]), 0, _lores(routed)], x_ND.shape[0], True, True, threads)

    def compute(self, x_ND: Tensor, residual_ND: Tensor, y_ND: Tensor, routed: Routed, threads: int, *, slot_Nk: Tensor | None = None) -> None:
        """The same for a choice that was made before. `slot_Nk`: where the experts lie in the matrices; None: at their numbers.

        Raises ValueError for experts that do not exist.
        """
        self._run([*addresses(x_ND, residual_ND, y_ND, *routed[:2], slot_Nk), _lores(routed)], x_ND.shape[0], False, True, threads)


class Attention:
    """Attention of new tokens to their caches."""

    def __init__(self, part: interface.Attention, cache: torch.dtype) -> None:
        self.part = part
        layout, (cosines, sines) = part.layout, (part.cosines, part.sines)
        turned = 0 if cosines is None else cosines.shape[1]
        window = -1 if part.window is None else part.window
        norms = (part.query_norm, part.key_norm)
        self._run = (
            built()
            .DecodeAttention(
                [layout.heads, layout.kv_heads, layout.head_dim, part.over_all_heads, turned, window, DTYPES[cache]],
                _float(cosines, sines, part.slopes),
                [_float(norm.scale, norm.shift) for norm in norms],
                [KINDS.index(norm.kind) for norm in norms],
                part.query_norm.epsilon,
            )
            .run
        )

    def __call__(self, fused_NW: Tensor, y_NX: Tensor, caches: Sequence[int], lengths: Sequence[int], threads: int) -> None:
        """Writes the context into `y_NX`. `caches`: addresses of the keys [G, P, d] of every row, then of the values; `lengths`: the tokens that each
        holds, then the positions P of each. Raises ValueError for a cache that is full."""
        self._run(fused_NW.data_ptr(), y_NX.data_ptr(), caches, lengths, threads)


def _router(matrix: Matrix | None, choice: Choice | None) -> list[int]:
    bias = _float(None if choice is None else choice.bias)
    return [0, 0, *bias] if matrix is None else [address(matrix.weight), *_float(matrix.scale), *bias]


def _projection(given: Projection | None) -> list[int]:
    if given is None:
        return NO_PROJECTION
    places: list[int] = []
    for matrix in (given.matrix, given.left, given.lore_a, given.lore_b):
        if matrix is not None and _format(matrix) != _format(given.matrix):
            raise FormatNotServed("the matrices of a projection must have one format")
        places += [0, 0] if matrix is None else [address(matrix.weight), *_float(matrix.scale)]
    return [*places, *_float(given.bias), 0]


def _lores(routed: Routed) -> int:
    return routed.lore_NkL.data_ptr() if routed.lore_NkL.shape[-1] else 0
