"""The compiled CUDA kernels: where the library is, what its functions take, and calls with tensors.

The library is made by `python csrc/cuda_build.py --library` where nvcc is. The same sources, built for the CPU by `--emulation`, take tensors of the
CPU and run on an emulated GPU that finds races and accesses out of bounds; every call raises RuntimeError with what it found.

Shapes:  R rows, sorted by group;  N places, R or the rows' choices sorted by LoRE;  I in;  O out;  Q rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron.kernels.registry import Implementation
from megatron.kernels.source_digest import cuda_source_digest

P = TypeVar("P")
LIBRARY = Path(__file__).resolve().parent / "libneox_cuda.so"
SOURCES = Path(__file__).resolve().parents[2] / "csrc"
HALVES = {torch.bfloat16: 0, torch.float16: 1}
"""The dtypes that the kernels compute in, by their number."""
MOST_GROUPS = 65535
"""What the smaller dimensions of a grid can count."""


class MatrixArgument(ctypes.Structure):
    """`Matrix` of csrc/include/cuda_tiles.cuh."""

    _fields_ = [("data", c_void_p), ("stride", c_int64), ("columns", c_int), ("aligned", c_int)]


class LoresArgument(ctypes.Structure):
    """`Lores` of csrc/grouped_gemm/rows.cuh."""

    _fields_ = [
        ("z", MatrixArgument),
        ("factor", MatrixArgument),
        ("factor_stride", c_int64),
        ("offsets", c_void_p),
        ("inverse", c_void_p),
        ("lores", c_int),
        ("per_row", c_int),
    ]


class RowProductArgument(ctypes.Structure):
    """`RowProduct` of csrc/grouped_gemm/rows.cuh."""

    _fields_ = [
        ("x", MatrixArgument),
        ("rows", c_int64),
        ("places", c_int64),
        ("order", c_void_p),
        ("order_divisor", c_int),
        ("scatter", c_int),
        ("offsets", c_void_p),
        ("groups", c_int),
        ("weight", MatrixArgument),
        ("weight_stride", c_int64),
        ("width", c_int),
        ("lores", LoresArgument),
        ("bias", c_void_p),
        ("addend", c_void_p),
        ("sums", c_void_p),
        ("product", c_void_p),
        ("result", c_void_p),
        ("gate", c_void_p),
        ("scale", c_void_p),
        ("activation", c_int),
    ]


class OuterProductArgument(ctypes.Structure):
    """`OuterProduct` of csrc/grouped_gemm/outer.cuh."""

    _fields_ = [
        ("left", MatrixArgument),
        ("right", MatrixArgument),
        ("right_rows", c_int64),
        ("order", c_void_p),
        ("order_divisor", c_int),
        ("offsets", c_void_p),
        ("groups", c_int),
        ("out", c_void_p),
    ]


class ActivationBackwardArgument(ctypes.Structure):
    """`ActivationBackward` of csrc/grouped_lore/elementwise.cuh."""

    _fields_ = [
        ("grad", c_void_p),
        ("up", c_void_p),
        ("gate", c_void_p),
        ("grad_up", c_void_p),
        ("grad_gate", c_void_p),
        ("count", c_int64),
        ("activation", c_int),
        ("aligned", c_int),
    ]


class LoreGradientsArgument(ctypes.Structure):
    """`LoreGradients` of csrc/grouped_lore/elementwise.cuh."""

    _fields_ = [
        ("u", c_void_p),
        ("grad_z", c_void_p),
        ("pi", c_void_p),
        ("order", c_void_p),
        ("places", c_int64),
        ("rank", c_int),
        ("z", c_void_p),
        ("grad_u", c_void_p),
        ("grad_pi", c_void_p),
    ]


class ColumnSumsArgument(ctypes.Structure):
    """`ColumnSums` of csrc/grouped_lore/elementwise.cuh."""

    _fields_ = [("x", c_void_p), ("width", c_int), ("offsets", c_void_p), ("groups", c_int), ("out", c_void_p)]


class Groups(NamedTuple):
    """Places sorted by group."""

    offsets: Tensor
    """int32, as csrc/grouped_gemm/groups.cuh says."""
    count: int  # type: ignore[assignment]
    places: int


class Gathered(NamedTuple):
    """Which row stands at each place: `order_N // per_row`."""

    order_N: Tensor
    per_row: int


@dataclass(frozen=True, kw_only=True)
class Lores:
    """LoREs as a part of a product of rows."""

    z_NQ: Tensor
    factor_GQO: Tensor
    groups: Groups
    """Of the LoREs."""
    inverse_RL: Tensor | None
    """None: the place in z is that of the product."""
    per_row: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A product of rows. Absent parts are None; `RowProduct` of csrc/grouped_gemm/rows.cuh says what each is."""

    x_RI: Tensor
    groups: Groups
    weight: Tensor | None
    """[groups, out, in], or [groups, in, out] where `outer`."""
    outer: bool
    width: int
    gathered: Gathered | None = None
    """None: place and row are the same."""
    scatter: bool = False
    """Write to the rows of x, not to the places."""
    lores: Lores | None = None
    bias: Tensor | None = None
    addend: Tensor | None = None
    sums: Tensor | None = None
    product: Tensor | None = None
    result: Tensor | None = None
    gate: Tensor | None = None
    scale: Tensor | None = None
    activation: int = 0


class CudaLibrary:
    """The functions of one library. Tensors given to one call are contiguous and on one device."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self.emulated = hasattr(self._functions, "emulation_register")
        self.device = "cpu" if self.emulated else "cuda"
        sizes = [self._functions.neox_sizes(which) for which in range(2)]
        self._functions.neox_source_digest.restype = ctypes.c_uint64
        other = not self.emulated and SOURCES.is_dir() and self._functions.neox_source_digest() != int(cuda_source_digest(SOURCES), 16)
        if other or sizes != [ctypes.sizeof(RowProductArgument), ctypes.sizeof(OuterProductArgument)]:
            raise OSError(f"{path.name} was built from other sources; 'python csrc/cuda_build.py --library' builds it again")
        if self.emulated:
            self._functions.emulation_reports.restype = ctypes.c_char_p
            self._functions.emulation_register.argtypes = [c_void_p, ctypes.c_size_t, ctypes.c_char_p]

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A result. What the emulation leaves unwritten stands out as NaN."""
        out = like.new_empty(shape, dtype=dtype)
        return out.fill_(torch.nan if out.is_floating_point() else -1) if self.emulated else out

    def offsets(self, counts_G: Tensor, places: int) -> Groups:
        """The groups of `places` places, for any counts: negative ones are 0, and what is too much is cut off. Raises ValueError for 2^31 places."""
        if places >= 1 << 31:
            raise ValueError(f"the CUDA kernels count rows in 32 bits, and there are {places}; split the batch")
        count = counts_G.shape[0]
        out = self.empty(counts_G, 3 * (count + 2), dtype=torch.int32)
        call = Call(self, {"counts": counts_G, "out": out})
        call.run("neox_group_offsets", call.pointer("counts"), c_int(count), c_int64(places), call.pointer("out"))
        return Groups(out, count, places)

    def rows(self, given: Rows) -> None:
        """Computes `given` into its results."""
        call = Call(self, {name: value for name, value in vars(given).items() if isinstance(value, Tensor)})
        call.tensors |= {"offsets": given.groups.offsets}
        argument = RowProductArgument(x=call.matrix("x_RI"), rows=given.x_RI.shape[0], places=given.groups.places, width=given.width)
        argument.order, argument.order_divisor = call.order(given.gathered)
        argument.scatter, argument.activation = given.scatter, given.activation
        argument.offsets, argument.groups = call.pointer("offsets"), given.groups.count
        if given.weight is not None:
            argument.weight, argument.weight_stride = call.matrix("weight"), given.weight[0].numel() if len(given.weight) else 0
        for name in ("bias", "addend", "sums", "product", "result", "gate", "scale"):
            setattr(argument, name, call.pointer(name))
        if given.lores is not None:
            argument.lores = call.lores(given.lores, given.groups)
        function = "neox_multiply_rows" if given.lores is None else "neox_multiply_lore_rows"
        call.run(function, ctypes.byref(argument), c_int(HALVES[given.x_RI.dtype]), c_int(given.outer))

    def outer(self, left_NI: Tensor, right_RO: Tensor, groups: Groups, gathered: Gathered | None = None) -> Tensor:
        """out[g] = sum over its places n of left[n]^T right[row of n]."""
        out = self.empty(left_NI, groups.count, left_NI.shape[1], right_RO.shape[1])
        call = Call(self, {"left": left_NI, "right": right_RO, "offsets": groups.offsets, "out": out})
        argument = OuterProductArgument(left=call.matrix("left"), right=call.matrix("right"), right_rows=right_RO.shape[0])
        argument.order, argument.order_divisor = call.order(gathered)
        argument.offsets, argument.groups, argument.out = call.pointer("offsets"), groups.count, call.pointer("out")
        call.run("neox_multiply_outer", ctypes.byref(argument), c_int(HALVES[left_NI.dtype]))
        return out

    def activation_backward(self, grad: Tensor, up: Tensor, gate: Tensor | None, activation: int) -> tuple[Tensor, Tensor | None]:
        """Gradients of `up`, and of `gate` where it is there."""
        grad_up, grad_gate = self.empty(up, *up.shape), None if gate is None else self.empty(up, *up.shape)
        tensors = {"grad": grad, "up": up, "gate": gate, "grad_up": grad_up, "grad_gate": grad_gate}
        call = Call(self, {name: tensor for name, tensor in tensors.items() if tensor is not None})
        argument = ActivationBackwardArgument(**{name: call.pointer(name) for name in tensors}, count=grad.numel(), activation=activation)
        argument.aligned = all(tensor.data_ptr() % 16 == 0 for tensor in call.tensors.values())
        call.run("neox_activation_backward", ctypes.byref(argument), c_int(HALVES[grad.dtype]))
        return grad_up, grad_gate

    def lore_gradients(self, u_NQ: Tensor, grad_z_NQ: Tensor, pi: Tensor, order_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(z_NQ, the gradient of u_NQ, the gradient of pi), the last one as `pi`: float32, one for each choice."""
        results = self.empty(u_NQ, *u_NQ.shape), self.empty(u_NQ, *u_NQ.shape), self.empty(pi, *pi.shape)
        tensors = {"u": u_NQ, "grad_z": grad_z_NQ, "pi": pi, "order": order_N, "z": results[0], "grad_u": results[1], "grad_pi": results[2]}
        call = Call(self, tensors)
        argument = LoreGradientsArgument(**{name: call.pointer(name) for name in tensors}, places=u_NQ.shape[0], rank=u_NQ.shape[1])
        call.run("neox_lore_gradients", ctypes.byref(argument), c_int(HALVES[u_NQ.dtype]))
        return results

    def column_sums(self, x_RO: Tensor, groups: Groups) -> Tensor:
        """out[g] = the sum of its rows."""
        out = self.empty(x_RO, groups.count, x_RO.shape[1])
        call = Call(self, {"x": x_RO, "offsets": groups.offsets, "out": out})
        argument = ColumnSumsArgument(**{name: call.pointer(name) for name in call.tensors}, width=x_RO.shape[1], groups=groups.count)
        call.run("neox_column_sums", ctypes.byref(argument), c_int(HALVES[x_RO.dtype]))
        return out


class Call:
    """One call of a function: the tensors that it may touch."""

    def __init__(self, library: CudaLibrary, tensors: dict[str, Tensor]) -> None:
        self.library, self.tensors = library, tensors

    def pointer(self, name: str) -> c_void_p:
        """Null where there is no such tensor."""
        tensor = self.tensors.get(name)
        return c_void_p(None if tensor is None else tensor.data_ptr())

    def matrix(self, name: str) -> MatrixArgument:
        """The rows of a tensor; of its first group where it has three dimensions. An empty one still has an address, which nothing reads."""
        tensor = self.tensors[name]
        address, columns = tensor.data_ptr(), tensor.shape[-1]
        return MatrixArgument(data=address or 16, stride=columns, columns=columns, aligned=address % 16 == 0 and columns % 8 == 0)

    def order(self, gathered: Gathered | None) -> tuple[c_void_p, int]:
        if gathered is not None:
            self.tensors["order"] = gathered.order_N
        return self.pointer("order"), 1 if gathered is None else gathered.per_row

    def lores(self, lores: Lores, groups: Groups) -> LoresArgument:
        given = {"z": lores.z_NQ, "factor": lores.factor_GQO, "lore_offsets": lores.groups.offsets, "inverse": lores.inverse_RL}
        self.tensors |= {name: tensor for name, tensor in given.items() if tensor is not None}
        argument = LoresArgument(
            z=self.matrix("z"), factor=self.matrix("factor"), offsets=self.pointer("lore_offsets"), inverse=self.pointer("inverse")
        )
        argument.factor_stride = lores.factor_GQO.shape[1] * lores.factor_GQO.shape[2]
        argument.lores, argument.per_row = lores.groups.count // max(1, groups.count), lores.per_row
        return argument

    def run(self, function: str, *arguments: Any) -> None:
        """Raises RuntimeError where the device refuses the call, or where the emulation finds a fault; ValueError for tensors of other devices."""
        device = next(iter(self.tensors.values())).device
        functions = self.library._functions
        if device.type != self.library.device or any(tensor.device != device for tensor in self.tensors.values()):
            where = ", ".join(f"{name} on {tensor.device}" for name, tensor in self.tensors.items())
            raise ValueError(
                f"the kernels read the memory of one {self.library.device} device, but there is {where}; move all to the device of the rows"
            )
        if self.library.emulated:
            functions.emulation_clear()
            for name, tensor in self.tensors.items():
                functions.emulation_register(tensor.data_ptr(), tensor.numel() * tensor.element_size(), name.encode())
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
            status = getattr(functions, function)(*arguments, c_void_p(stream))
        if status != 0:
            found = functions.emulation_reports().decode() if self.library.emulated else f"the CUDA runtime refused it with error {status}"
            raise RuntimeError(f"{function}: {found}")


@cache
def load() -> CudaLibrary:
    """The library for the GPU. Raises OSError where it is not there or does not fit."""
    return CudaLibrary(LIBRARY)


def unavailable() -> str | None:
    """Why there are no compiled CUDA kernels here. None: they are there."""
    if not LIBRARY.is_file():
        return f"{LIBRARY.name} is not built; 'python csrc/cuda_build.py --library' builds it where nvcc is"
    try:
        load()
    except OSError as reason:
        return str(reason)
    return None


def implementation(make: Callable[[], P]) -> Implementation[P]:
    """The entry `cuda` of an op."""
    return Implementation("cuda", frozenset({"cuda"}), unavailable, make)


def check_counts(counts: Tensor, total: int) -> None:
    """Raises ValueError for negative counts, or for a sum that is not `total`. Only for counts on the CPU: others would wait for the device."""
    if counts.device.type != "cpu":
        return
    values = counts.tolist()
    if min(values, default=0) < 0:
        raise ValueError(f"row counts {values} have a negative one; a group has no rows or some")
    if sum(values) != total:
        raise ValueError(f"row counts sum to {sum(values)}, but there are {total} rows; every row belongs to exactly one group")
