"""What `deepy.py --check` shows: what was asked for, how large the model is, and what a step takes."""

from __future__ import annotations

import json
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from megatron.analysis.offload_size import offload_lines
from megatron.analysis.size import memory_in_layout
from megatron.analysis.tables import bytes_text, plain_table
from megatron.analysis.vocabulary import Vocabulary
from megatron.config.loader import LoadedConfig
from megatron.config.neox import OWNER, SECTION_CLASSES, NeoXConfig, check_trainable, data_parallel_size, rounding_notice
from megatron.config.parallel import ONE, layout_problem
from megatron.config.section import ConfigError, Section
from megatron.config.size import count_parameters, flops_per_token, padded_vocab_size
from megatron.config.training import resolve_batch
from megatron.launcher.implementations import implementations


def summary(loaded: LoadedConfig, processes: int, words: Vocabulary, device: str) -> list[RenderableType]:
    """Tables and lines for a terminal: given keys with their defaults, parameters, batch and tokens, memory and FLOPs, implementations, notices.

    `device`: PyTorch's name of this machine's devices. `check_backends` must have found nothing.
    """
    sources = [*loaded.files, *(["command line"] if loaded.overrides else [])]
    without = "" if words.size is not None else f" without the vocabulary ({words.reason})"
    parts: list[RenderableType] = [
        _heading(f"Given in {', '.join(sources)}"),
        _given(loaded.config),
        _heading(f"Parameters{without}"),
        _parameters(loaded.config, words),
        _heading("One step"),
        _work(loaded.config, processes, words),
        *_generation(loaded.config, words),
        _heading(f"What computes on this machine ({device})"),
        _implementations(loaded.config, device),
        "",
    ]
    parts += [f"note: {escape(notice)}" for notice in loaded.notices]
    if loaded.config.precision == "fp16":
        parts.append("note: training in fp16 needs a GPU")
    if notice := rounding_notice(loaded.config, max(1, processes // loaded.config.parallel.layout.model)):
        parts.append(f"note: {escape(notice)}")
    try:
        check_trainable(loaded.config, data_parallel_size(loaded.config, processes))
    except ConfigError as error:
        parts += [f"cannot train yet: {escape(problem)}" for problem in error.problems]
    return parts


def _given(config: NeoXConfig) -> Table:
    table = _table("section", "key", "value", "default")
    given = config.given() | {"precision": config.precision}
    for key in (key for key in OWNER if key in given):
        field = SECTION_CLASSES[OWNER[key]].model_fields[key]
        default = "required" if field.is_required() else _text(field.get_default(call_default_factory=True))
        table.add_row(OWNER[key], key, escape(_text(given[key])), escape(default))
    return table


def _parameters(config: NeoXConfig, words: Vocabulary) -> Table:
    padded = _padded(config, words)
    count = count_parameters(config.model, config.moe, padded)
    table = _table("part", "total", "active for one token", numbers=True)
    for part, number in count.total.items():
        if number:
            table.add_row(part, f"{number:,}", f"{count.active[part]:,}")
    table.add_section()
    table.add_row("all", f"{count.total_sum:,}", f"{count.active_sum:,}")
    return table


def _work(config: NeoXConfig, processes: int, words: Vocabulary) -> Table:
    padded = _padded(config, words)
    table = _table("what", "value")
    table.add_row("processes", _processes(config, processes))
    if words.size is not None:
        table.add_row("vocabulary", f"{words.size:,}, padded to {padded:,}")
    training = config.training
    flops = flops_per_token(config.model, config.moe, padded, recompute=training.checkpoint_activations, modules=training.recompute_modules)
    table.add_row("FLOPs per token (training)", f"{flops:.3e}")
    try:
        replicas = data_parallel_size(config, processes)
        batch = resolve_batch(config.training, replicas)
    except ConfigError:
        batch = None
    if batch is not None:
        tokens = batch.global_ * config.model.seq_length
        table.add_row(
            "sequences per step",
            f"{batch.global_:,} = {batch.micro} x {batch.accumulation} accumulation x {replicas} {'process' if replicas == 1 else 'processes'}",
        )
        table.add_row("tokens per step", f"{tokens:,}")
        table.add_row("FLOPs per step", f"{tokens * flops:.3e}")
        if config.training.train_iters is not None:
            table.add_row("steps, tokens in all", f"{config.training.train_iters:,}, {tokens * config.training.train_iters:,}")
        elif config.training.train_epochs is not None:
            table.add_row(
                "steps", f"{config.training.train_epochs:,} passes through the training data; the number of steps is known when the data is read"
            )
    table.add_section()
    stage = config.optimizer.zero_optimization.stage
    memory = memory_in_layout(config, count_parameters(config.model, config.moe, padded), processes)
    table.add_row("memory per process", f"{bytes_text(memory.total)} without activations ({config.precision}, ZeRO stage {stage})")
    table.add_row("", f"weights {bytes_text(memory.weights)}, gradients {bytes_text(memory.gradients)}, optimizer {bytes_text(memory.optimizer)}")
    return table


def _generation(config: NeoXConfig, words: Vocabulary) -> list[RenderableType]:
    """What experts in slow memory take; nothing where all are resident."""
    table = _table("what", "value")
    for line in offload_lines(config, _padded(config, words)):
        table.add_row(*map(escape, line))
    return [_heading("Generation (expert_offload)"), table] if table.row_count else []


def _processes(config: NeoXConfig, processes: int) -> str:
    """Their number, and how they divide the model."""
    layout = config.parallel.layout
    kinds = (("tensor", layout.tensor), ("pipeline", layout.pipe), ("data", processes // layout.model))
    if layout == ONE or layout_problem(layout, processes) is not None:
        return str(processes)
    product = " x ".join(f"{size} {kind}" for kind, size in kinds if size > 1 or kind == "data")
    return f"{processes} = {product} parallel" + (f", experts over {layout.expert}" if layout.expert > 1 else "")


def _implementations(config: NeoXConfig, device: str) -> Table:
    table = _table("part", "runs", "why")
    for choice in implementations(config, device):
        table.add_row(*map(escape, choice))
    return table


def _padded(config: NeoXConfig, words: Vocabulary) -> int:
    return padded_vocab_size(words.size or 0, config.model.make_vocab_size_divisible_by)


def _heading(text: str) -> str:
    return f"\n[bold]{escape(text)}[/bold]"


def _table(*columns: str, numbers: bool = False) -> Table:
    return plain_table(*columns, numbers=numbers, whole=("section", "key", "what", "part", "runs"))


def _text(value: Any) -> str:
    return json.dumps(value.model_dump(mode="json") if isinstance(value, Section) else value)
