"""A trace as blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.analysis.routing.blocks import Block, Shape
from megatron.monitor.routing_trace import Trace

LENGTH = 2048
"""Tokens of a block at most."""
UNNAMED = "text"
"""The domain of a trace that names none."""


def shape_of(trace: Trace) -> Shape:
    """What is known before its first token."""
    lores = trace.lore_TLKM
    return Shape(
        list(trace.layers),
        trace.experts_by_layer,
        trace.expert_TLK.shape[2],
        list(trace.domains) or [UNNAMED],
        0 if lores is None else trace.num_lores,
        0 if lores is None else lores.shape[-1],
    )


def blocks_of(trace: Trace) -> Iterator[Block]:
    """Its tokens in order. A block ends where the text or the domain changes, and goes on where only its length ended it."""
    changes = np.zeros(trace.tokens, np.bool_)
    for number_T in (trace.sequence_T, trace.domain_T):
        if number_T is not None:
            changes[1:] |= np.diff(number_T) != 0
    starts = [0, *np.flatnonzero(changes).tolist(), trace.tokens]
    for start, end in itertools.pairwise(starts):
        for begin in range(start, end, LENGTH):
            span = slice(begin, min(begin + LENGTH, end))
            domain = 0 if trace.domain_T is None else int(trace.domain_T[begin])
            yield Block(
                domain, trace.expert_TLK[span], _part(trace.weight_TLK, span), _part(trace.token_T, span), _part(trace.lore_TLKM, span), begin > start
            )


def _part(values: npt.NDArray[Any] | None, span: slice) -> npt.NDArray[Any] | None:
    return None if values is None else values[span]
