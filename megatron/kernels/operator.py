"""Torch operators, called without torch's dispatcher where nothing listens to it.

An operator can be compiled, traced, and computed on the meta device. The way there costs about 60 microseconds a call and its backward, most of it in
Python: 3 ms in a step of the quickstart. So a plain call, which is every call of an ordinary step, goes straight to the function.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN = frozenset({Tensor, torch.nn.Parameter})


class Operator:
    """The torch operator `name` ("neox::op"); the annotations of `function` are its schema, and it changes no argument.

    As `torch.library.custom_op`, which would also import torch's compiler at the first call: two seconds of every start.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Defines it."""
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        namespace, operator = name.split("::")
        self.name, self.function = name, function
        self.overload = getattr(getattr(torch.ops, namespace), operator).default
        """What torch knows it as."""
        self.save: Callable[..., None] | None = None
        self.backward: Callable[..., tuple[Any, ...]] | None = None

    def differentiate(self, save: Callable[..., None], backward: Callable[..., tuple[Any, ...]]) -> None:
        """`save(ctx, inputs, output)` keeps what `backward(ctx, *grads)` needs. This returns a gradient or None for each input, a list for a list."""
        torch.library.register_autograd(self.name, backward, setup_context=save)
        self.save, self.backward = save, backward

    def __call__(self, *inputs: Any) -> Any:
        """What the function returns; its gradient is that of `differentiate`. Differentiating twice raises RuntimeError."""
        if torch.compiler.is_compiling() or _watched():
            return self.overload(*inputs)
        flat = [each for given in inputs for each in (given if type(given) is list else (given,))]
        tensors = [each for each in flat if isinstance(each, Tensor)]
        if any(type(t) not in PLAIN or t.is_meta for t in tensors):
            return self.overload(*inputs)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return self.function(*inputs)
        if self.backward is None:
            return self.overload(*inputs)  # torch warns that it has no gradient
        return _Direct.apply(self, [len(given) if type(given) is list else None for given in inputs], *flat)


def _watched() -> bool:
    """Whether a mode, a transformation, a trace or a profile has to see the operator itself."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _nested(flat: Any, lengths: list[int | None]) -> list[Any]:
    """As the function takes it: lists of these lengths, and single inputs."""
    places = iter(flat)
    return [next(places) if length is None else list(islice(places, length)) for length in lengths]


class _Direct(torch.autograd.Function):
    """An operator's function and its gradient."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, lengths: list[int | None], *flat: Any) -> Any:
        inputs = _nested(flat, lengths)
        output = operator.function(*inputs)
        operator.save(ctx, tuple(inputs), output)  # type: ignore[misc]  # called with a gradient only
        ctx.operator, ctx.lengths, ctx.needs_input_grad = operator, lengths, _nested(ctx.needs_input_grad[2:], lengths)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        flat: list[Tensor | None] = []
        for grad, length in zip(ctx.operator.backward(ctx, *grads), ctx.lengths, strict=True):
            flat += [grad] if length is None else [None] * length if grad is None else grad
        return None, None, *flat


def torch_operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes a function the torch operator `name`."""
    return lambda function: Operator(name, function)
