"""From models, or traces, and texts to findings: one model after the other, one batch of text after the other."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron.analysis.routing.blocks import Block, Shape
from megatron.analysis.routing.findings import Counts, Findings, Model
from megatron.analysis.routing.from_trace import blocks_of, shape_of
from megatron.analysis.routing.huggingface_model import open_directory
from megatron.analysis.routing.our_model import open_checkpoint
from megatron.analysis.routing.progress import Progress
from megatron.analysis.routing.routed_model import RoutedModel, RoutedModelError
from megatron.analysis.routing.saturation import Kept, in_order, saturation
from megatron.analysis.routing.tally import Measures, Origin, Tally
from megatron.analysis.routing.texts import Domain
from megatron.analysis.routing.trace_file import TraceKeeper, read_traces
from megatron.monitor.routing_trace import Trace

MOST_CONTEXT = 1024
"""Tokens of a window, if nothing else is asked for."""
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    paths: Sequence[Path]
    domains: Sequence[Domain]
    tokens: int = 20_000
    """Of each domain, at most."""
    context: int | None = None
    """Tokens that are read together. None: as many as the model takes, at most MOST_CONTEXT."""
    measures: Measures = field(default_factory=Measures)
    compared_tokens: int = 20_000
    """Tokens for saturation, whose choices stay in memory."""
    num_experts: int | None = None
    """Of a layer, for traces that do not say it. None: as many as the trace names."""
    trace: Path | None = None
    """A file for the whole routing of the only model. None: none."""
    trusted: bool = False
    """Code that lies beside a model may run."""


def analyse(request: Request, progress: Progress) -> Findings:
    """Reads every path. Raises RoutedModelError, TraceError, TextError and what loading a model raises."""
    if request.trace is not None and len(request.paths) > 1:
        raise RoutedModelError(f"--trace writes the routing of one model, and {len(request.paths)} paths were given. Give one path.")
    models: list[Model] = []
    kept: list[Kept] = []
    for path in request.paths:
        model, own = _one(path, request, progress)
        models.append(_renamed(model, models))
        kept.append(replace(own, name=models[-1].name))
    compared = saturation(in_order(kept))
    notes = [compared] if isinstance(compared, str) else []
    return Findings(models, None if isinstance(compared, str) else compared, notes + [note for model in models for note in _notes(model)])


def _one(path: Path, request: Request, progress: Progress) -> tuple[Model, Kept]:
    begun = time.monotonic()
    if not path.exists():
        raise RoutedModelError(f"There is no {path}. Give a checkpoint (or the directory of a run), a Hugging Face directory, or routing traces.")
    if (trace := read_traces(path, num_experts=request.num_experts)) is not None:
        return _of_trace(trace, path, request, begun)
    opened: RoutedModel
    if (path / "config.json").is_file():
        opened = open_directory(path, trusted=request.trusted)
    else:
        opened = open_checkpoint(path, trusted=request.trusted)
    return _of_model(opened, request, progress, begun)


def _of_trace(trace: Trace, path: Path, request: Request, begun: float) -> tuple[Model, Kept]:
    shape = shape_of(trace)
    occurrences = Counter() if trace.token_T is None else Counter(trace.token_T.tolist())
    tally = Tally(shape, request.measures, occurrences)
    for block in blocks_of(trace):
        tally.add(block)
    steps = sorted(set(trace.step_T.tolist())) if trace.model else []
    origin = Origin(trace.model or path.name, str(path), "trace", steps[0] if len(steps) == 1 and steps[0] else None)
    size = request.compared_tokens
    tokens = np.arange(trace.tokens) if trace.token_T is None else trace.token_T
    kept = Kept(origin.name, origin.iteration, shape.layers, shape.experts_L, tokens[:size], trace.expert_TLK[:size])
    return tally.found(origin, trace.pieces or {}, seconds=time.monotonic() - begun), kept


def _of_model(model: RoutedModel, request: Request, progress: Progress, begun: float) -> tuple[Model, Kept]:
    texts = [domain.tokens(model.encode, most=request.tokens, end=model.end) for domain in request.domains]
    kind, occurrences = model.kind, _occurrences(texts)
    names = [domain.name for domain in request.domains]
    shape = Shape(kind.layers, kind.experts_L, kind.top_k, names, kind.num_lores, kind.lores_per_token)
    tally, keeper = Tally(shape, request.measures, occurrences), TraceKeeper(request.compared_tokens if request.trace is None else None)
    context = min(model.context, request.context or MOST_CONTEXT)
    with progress.bar(model.origin.name, sum(map(len, texts))) as advance:
        for block in routed_blocks(model, texts, context):
            tally.add(block)
            keeper.add(block)
            advance(len(block.expert_TLK))
    pieces = model.pieces(occurrences)
    if request.trace is not None:
        keeper.write(request.trace, shape, pieces, model.origin.name)
    own = keeper.kept(model.origin, shape, request.compared_tokens)
    return tally.found(model.origin, pieces, seconds=time.monotonic() - begun), own


def routed_blocks(model: RoutedModel, texts: Sequence[Counts], context: int) -> Iterator[Block]:
    """Every text in windows of `context` tokens, which do not see each other; a block for each window."""
    for domain, token_T in enumerate(texts):
        for batch_BS in _batches(token_T, context):
            routed, length = model.route(batch_BS), batch_BS.shape[1]
            for number, window_S in enumerate(batch_BS):
                span = slice(number * length, (number + 1) * length)
                lores = None if routed.lore_TLKU is None else routed.lore_TLKU[span]
                yield Block(domain, routed.expert_TLK[span], routed.weight_TLK[span], window_S, lores)


def _batches(token_T: Counts, context: int) -> Iterator[Counts]:
    """Windows of the same length together; what is left at the end alone."""
    whole = len(token_T) // context * context
    windows = token_T[:whole].reshape(-1, context)
    together = max(1, BATCH_TOKENS // context)
    for begin in range(0, len(windows), together):
        yield windows[begin : begin + together]
    if whole < len(token_T):
        yield token_T[None, whole:]


def _occurrences(texts: Sequence[Counts]) -> Mapping[int, int]:
    tokens, counts = np.unique(np.concatenate(texts), return_counts=True)
    return dict(zip(tokens.tolist(), counts.tolist(), strict=True))


def _renamed(model: Model, before: Sequence[Model]) -> Model:
    """With a name that no model before has."""
    names, name, number = {other.name for other in before}, model.name, 2
    while name in names:
        name, number = f"{model.name} ({number})", number + 1
    return replace(model, name=name)


def _notes(model: Model) -> Iterator[str]:
    """What a reader of the numbers should know."""
    if model.kind == "trace" and all(np.isnan(model.load.weight_LK).ravel()):
        yield f"{model.name}: the trace has no weights. The first choice is the first expert that it names for a token."
    if model.specialisation.vocabulary_size == 0:
        least = model.specialisation.least_count
        yield f"{model.name}: no token is known to occur {least} times, so there is no vocabulary specialisation. More tokens would help."
    if not model.repeats.pairs_G.all():
        yield f"{model.name}: a domain has no two consecutive tokens, so repeats are not known there."
