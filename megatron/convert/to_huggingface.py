"""A checkpoint as a directory of Hugging Face's: whole and checked, or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.config.data import DataConfig
from megatron.convert.architecture import Architecture
from megatron.convert.architectures.balance import COEFFICIENT, export_notices
from megatron.convert.card import model_card
from megatron.convert.choice import AUTO, choose_architecture, left_origin
from megatron.convert.dropped import finite
from megatron.convert.errors import ConversionError
from megatron.convert.json_files import write_json
from megatron.convert.logits import Allowed, Compared, compare, our_logits, their_logits, tokens_to_compare
from megatron.convert.mapping import check_complete, to_theirs
from megatron.convert.opened import EMBEDDING, Opened, open_checkpoint
from megatron.convert.shapes import checked_read, model_shapes
from megatron.convert.staging import check_written_by_export, checked_target, write_record
from megatron.convert.tensor_files import ShardWriter
from megatron.convert.tokenizers import (
    SpecialTokens,
    check_tokenizer,
    imported_ids,
    kept_generation,
    save_tokenizer,
    stated_tokens,
    token_settings,
)
from megatron.data.locking import naming
from megatron.data.progress import Reporter, Stage
from megatron.data.staging import publish, staging_folder
from megatron.data.tokenizer import NULL, build_tokenizer
from megatron.data.tokenizer.companions import GENERATION, ROUTER_LOGITS
from megatron.kernels.precision import DTYPES
from megatron.training.memory import check_comparison_fits

PRECISIONS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bfloat16"}
"""What `--precision` takes -> `precision` in our configurations."""


@dataclass(frozen=True)
class Export:
    """What to write, and how. `precision` auto: as the checkpoint has it. `pad_token_id` None: the tokenizer's, if it has one."""

    input_dir: Path
    output_dir: Path
    config_files: tuple[Path, ...] = ()
    architecture: str = AUTO
    precision: str = AUTO
    save_tokenizer: bool = True
    vocab_is_hf: bool = False
    """`vocab_file` is a tokenizer of Hugging Face's (a tokenizer.json or its folder), whatever `tokenizer_type` says."""
    pad_token_id: int | None = None
    shard_bytes: int = 10**9
    check: bool = True
    force: bool = False
    """Replaces a directory that is there already."""
    trust_remote_code: bool = False
    """Imports the modules that the checkpoint's own configuration names under `plugins`."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    class_name: str
    parameters: int
    bytes: int
    compared: Compared | None
    """None where the comparison was not wanted."""
    notices: tuple[str, ...]


def export_checkpoint(export: Export, reporter: Reporter) -> Exported:
    """Writes weights, config.json, generation_config.json, tokenizer and model card, loads the result and compares its logits.

    Raises ConversionError, CheckpointError, ConfigError, TokenizerError; nothing is at `output_dir` then that was not there before.
    """
    target = checked_target(export.output_dir, force=export.force, to_do="replace", source=export.input_dir)
    check_written_by_export(target)
    opened = open_checkpoint(export.input_dir, export.config_files, trusted=export.trust_remote_code)
    architecture = choose_architecture(opened.source, export.architecture, opened.weights.read, opened.origin)
    left = left_origin(opened.origin, architecture, opened.source, opened.weights.read) if export.architecture == AUTO else None
    table = list(architecture.table(opened.source))
    check_complete(table, set(opened.weights.names))
    if export.check:
        check_comparison_fits(opened.source.config, opened.source.vocabulary)
    with naming(target.parent), staging_folder(target) as stage:
        data = tokenizer_config(opened, export)
        special = save_tokenizer(data, stage) if export.save_tokenizer else stated_tokens(data)
        special = special._replace(pad=special.pad if export.pad_token_id is None else export.pad_token_id)
        with reporter.stage("weights", None) as progress:
            writer = write_weights(opened, architecture, export, stage, progress)
        write_settings(opened, architecture, special, stage, dtype_of(opened, export))
        notice = tokenizer_notice(data, stage) if export.save_tokenizer else None
        compared = compare_logits(opened, export, stage, architecture) if export.check else None
        (stage / "README.md").write_text(model_card(target.name, opened, architecture, str(compared) if compared is not None else None))
        write_record(stage)
        publish(stage, target)
    notices = (*opened.weights.notices, *filter(None, [left, notice]), *export_notices(opened.source, architecture))
    return Exported(architecture.class_name, writer.parameters, writer.total_bytes, compared, notices)


def tokenizer_notice(data: DataConfig, stage: Path) -> str | None:
    """What a user should know about the exported tokenizer. None: nothing. Raises ConversionError for one that reads text otherwise than ours."""
    if data.tokenizer_type == NULL:
        return "The export has no tokenizer, because the model was imported without one (tokenizer_type NullTokenizer)."
    return check_tokenizer(data, stage)


def dtype_of(opened: Opened, export: Export) -> torch.dtype:
    """The number format of the exported weights. Raises ConversionError for an unknown one."""
    if export.precision == AUTO:
        return opened.weights.read(EMBEDDING).dtype
    if export.precision not in PRECISIONS:
        raise ConversionError(f"--precision {export.precision}: must be {AUTO} or one of {', '.join(PRECISIONS)}.")
    return DTYPES[PRECISIONS[export.precision]]


def tokenizer_config(opened: Opened, export: Export) -> DataConfig:
    """The section that names the tokenizer."""
    data = opened.source.config.data
    if not export.vocab_is_hf:
        return data
    file = Path(str(data.vocab_file))
    return data.model_copy(update={"tokenizer_type": "HFTokenizer", "vocab_file": str(file / "tokenizer.json" if file.is_dir() else file)})


def write_weights(opened: Opened, architecture: Architecture, export: Export, directory: Path, progress: Stage) -> ShardWriter:
    """Weight by weight, so that one layer and one shard are in memory. Raises ConversionError for numbers that are not finite."""
    dtype, writer = dtype_of(opened, export), ShardWriter(directory, export.shard_bytes)
    read = checked_read(opened.weights.read, model_shapes(opened.source))
    for named in to_theirs(architecture.table(opened.source), read):
        tensor = finite(named.name, named.tensor, named.tensor if named.exact else named.tensor.to(dtype))
        writer.add(named.name, tensor)
        progress.advance(tensor.nbytes, 0)
    writer.close()
    return writer


def write_settings(opened: Opened, architecture: Architecture, special: SpecialTokens, directory: Path, dtype: torch.dtype) -> None:
    """config.json, generation_config.json and the code that the class needs."""
    tokens = token_settings(opened.source.config.data, special)
    name = str(dtype).removeprefix("torch.")
    settings: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    settings |= architecture.settings(opened.source) | tokens | {"dtype": name, "torch_dtype": name, "use_cache": True}
    stated = imported_ids(opened.source.config.data) or {}
    if COEFFICIENT in settings and ROUTER_LOGITS in stated:
        settings[ROUTER_LOGITS] = stated[ROUTER_LOGITS]
    if architecture.code is not None:
        settings["auto_map"] = architecture.code.auto_map
        for file in architecture.code.files:
            shutil.copyfile(file, directory / file.name)
    write_json(directory / "config.json", settings)
    named = {key: token for key, token in tokens.items() if token is not None}
    write_json(directory / GENERATION, {**named, **kept_generation(opened.source.config.data)})


def compare_logits(opened: Opened, export: Export, directory: Path, architecture: Architecture) -> Compared:
    """Ours first, so that one model is in memory at a time. Raises ConversionError where they differ."""
    data = tokenizer_config(opened, export)
    tokenizer = build_tokenizer(data) if export.save_tokenizer and data.tokenizer_type != NULL else None
    texts = tokens_to_compare(opened.source, tokenizer)
    exact = {entry.ours for entry in architecture.table(opened.source) if entry.exact and entry.ours is not None}
    ours = our_logits(opened.source, opened.weights.read, texts, precision=dtype_of(opened, export), exact=exact)
    from transformers import AutoModelForCausalLM

    allowed = Allowed(trusted=architecture.code is not None)  # this version's code, which was just written there
    return compare(ours, their_logits(directory, texts, precision=torch.float32, loader=AutoModelForCausalLM, allowed=allowed))


def described(exported: Exported, target: Path) -> Iterator[str]:
    """What a user should see at the end."""
    yield from exported.notices
    yield f"{target}: {exported.class_name}, {exported.parameters:,} parameters, {exported.bytes / 1e6:,.1f} MB."
    if exported.compared is not None:
        yield f"Compared with the checkpoint: {exported.compared}."
