"""Routing by the CUDA kernels of csrc/route: float32; float64 by the reference. Only the check without `allow_nan` waits for the device.

Shapes as in the package's docstring. A row is decided by one warp, whatever its parent. The choices are sorted by counting, and a row that no parent
has stands behind all others.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from megatron.kernels.cuda_library import Call, CudaLibrary, Groups, load
from megatron.kernels.permute import Order
from megatron.kernels.route.interface import Gradients, Routed, Saved, Selection
from megatron.kernels.route.reference import Reference, check_rows, refuse_not_a_number

MOST_GROUPS = 16_384
"""The counting sort has a counter for each group in the shared memory of a block."""


class SelectedArgument(ctypes.Structure):
    """`Selected` of csrc/route/cuda.cu."""

    _fields_ = [
        ("rows", c_int64),
        ("candidates", c_int),
        ("top", c_int),
        ("parents", c_int),
        ("offsets", c_void_p),
        ("scale", c_float),
        ("normalize", c_int),
    ]


def _of(name: str, *pointers: str) -> type[ctypes.Structure]:
    """A structure of csrc/route/cuda.cu: `Selected`, then pointers."""
    return type(name, (ctypes.Structure,), {"_fields_": [("of", SelectedArgument), *((pointer, c_void_p) for pointer in pointers)]})


RouteArgument = _of("RouteArgument", "logit", "weight", "choice", "key", "probability", "log_sum", "entropy")
GRADIENTS = ("grad_weight", "grad_probability", "grad_log_sum", "grad_total")
RouteBackwardArgument = _of("RouteBackwardArgument", *GRADIENTS, "probability", "choice", "grad_logit")
RouteSumsArgument = _of("RouteSumsArgument", "probability", "entropy", "partial", "total", "mean")


class CountingSortArgument(ctypes.Structure):
    """`CountingSort` of csrc/route/cuda.cu."""

    _fields_ = [
        ("keys", c_void_p),
        ("count", c_int64),
        ("groups", c_int),
        ("before", c_void_p),
        ("rows", c_void_p),
        ("offsets", c_void_p),
        ("order", c_void_p),
        ("inverse", c_void_p),
    ]


class Cuda(Reference):
    """The decision and its gradient; statistics are those of the reference."""

    def __init__(self, library: CudaLibrary | None = None) -> None:
        """`library` None: the one for the GPU."""
        self.library = library or load()
        functions = self.library._functions
        functions.neox_route_tiles.argtypes, functions.neox_route_tiles.restype = [c_int64, c_int], c_int64
        functions.neox_sort_chunks.argtypes, functions.neox_sort_chunks.restype = [c_int64], c_int64
        ours = RouteArgument, RouteBackwardArgument, RouteSumsArgument, CountingSortArgument
        if [functions.neox_route_sizes(which) for which in range(len(ours))] != [ctypes.sizeof(each) for each in ours]:
            raise OSError("the CUDA kernels were built from other sources; build them again")

    def forward(self, logit_NC: Tensor, rows_P: Tensor | None, selection: Selection, *, allow_nan: bool) -> Routed:
        """The decision."""
        (rows, candidates), top_k, parents = logit_NC.shape, selection.top_k, 1 if rows_P is None else len(rows_P)
        if logit_NC.dtype != torch.float32 or parents * candidates > MOST_GROUPS:
            return super().forward(logit_NC, rows_P, selection, allow_nan=allow_nan)
        logit_NC, groups = logit_NC.contiguous(), self._parents(logit_NC, rows_P)
        new, whole = self.library.empty, torch.int64
        results = {
            "weight": new(logit_NC, rows, top_k),
            "choice": new(logit_NC, rows, top_k, dtype=whole),
            "key": new(logit_NC, rows, top_k, dtype=whole),
            "probability": new(logit_NC, rows, candidates),
            "log_sum": new(logit_NC, rows),
            "entropy": new(logit_NC, rows),
        }
        call = Call(self.library, {"logit": logit_NC, "offsets": groups.offsets, **results})
        pointers = {name: call.pointer(name) for name in ("logit", *results)}
        call.run("neox_route", ctypes.byref(RouteArgument(of=_selected(call, groups, candidates, selection), **pointers)))
        if not allow_nan:
            refuse_not_a_number(int(results["log_sum"].isnan().sum()), rows)
        total_PC, entropy = self._sums(results["probability"], results["entropy"], groups)
        order = self.sort(results["key"], parents * candidates)
        return Routed(results["weight"], results["choice"], results["probability"], results["log_sum"], total_PC, entropy, order)

    def backward(self, grads: Gradients, saved: Saved, selection: Selection) -> Tensor:
        """grad_logit_NC."""
        probability_NC, choice_NK, rows_P = saved
        if probability_NC.dtype != torch.float32:
            return super().backward(grads, saved, selection)
        probability_NC, choice_NK, groups = probability_NC.contiguous(), choice_NK.contiguous(), self._parents(probability_NC, rows_P)
        given = {name: grad.contiguous() for name, grad in zip(GRADIENTS, grads, strict=True) if grad is not None}
        grad_NC = self.library.empty(probability_NC, *probability_NC.shape)
        tensors = {"probability": probability_NC, "choice": choice_NK, "grad_logit": grad_NC, **given}
        call = Call(self.library, {**tensors, "offsets": groups.offsets})
        of = _selected(call, groups, probability_NC.shape[1], selection)
        call.run("neox_route_backward", ctypes.byref(RouteBackwardArgument(of=of, **{name: call.pointer(name) for name in tensors})))
        return grad_NC

    def sort(self, key_NK: Tensor, groups: int) -> Order:
        """The stable order of the keys. Keys that are not 0 to `groups` - 1 stand behind all others, and no group counts them."""
        count = key_NK.numel()
        chunks = self.library._functions.neox_sort_chunks(count)
        sizes = {"before": chunks * (groups + 1), "offsets": 3 * (groups + 3)}
        tensors = {"keys": key_NK} | {name: self.library.empty(key_NK, size, dtype=torch.int32) for name, size in sizes.items()}
        tensors |= {"rows": self.library.empty(key_NK, groups + 1), "order": self.library.empty(key_NK, count)}
        tensors["inverse"] = self.library.empty(key_NK, *key_NK.shape)
        call = Call(self.library, tensors)
        argument = CountingSortArgument(**{name: call.pointer(name) for name in tensors}, count=count, groups=groups)
        call.run("neox_counting_sort", ctypes.byref(argument))
        return Order(tensors["order"], tensors["inverse"], tensors["rows"][:groups])

    def _parents(self, like_NC: Tensor, rows_P: Tensor | None) -> Groups:
        rows = like_NC.shape[0]
        if rows_P is None:
            rows_P = torch.full((1,), rows, dtype=torch.int64, device=like_NC.device)
        elif rows_P.device.type == "cpu":
            check_rows(rows_P, rows)
        return self.library.offsets(rows_P.contiguous(), rows)

    def _sums(self, probability_NC: Tensor, entropy_N: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """(total_PC, the mean of the entropies)."""
        rows, candidates = probability_NC.shape
        tiles = self.library._functions.neox_route_tiles(rows, groups.count)
        new = self.library.empty
        partial, total, mean = new(probability_NC, tiles, candidates + 1), new(probability_NC, groups.count, candidates), new(probability_NC)
        tensors = {"probability": probability_NC, "entropy": entropy_N, "partial": partial, "total": total, "mean": mean}
        call = Call(self.library, {**tensors, "offsets": groups.offsets})
        of = _selected(call, groups, candidates, Selection(1))
        call.run("neox_route_sums", ctypes.byref(RouteSumsArgument(of=of, **{name: call.pointer(name) for name in tensors})))
        return total, mean


def _selected(call: Call, groups: Groups, candidates: int, selection: Selection) -> SelectedArgument:
    return SelectedArgument(
        rows=groups.places,
        candidates=candidates,
        top=selection.top_k,
        parents=groups.count,
        offsets=call.pointer("offsets"),
        scale=selection.scale,
        normalize=selection.normalize,
    )
