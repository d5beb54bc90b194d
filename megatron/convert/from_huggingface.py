"""A directory of Hugging Face's as a checkpoint of ours, with the configuration to go on training it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from megatron.checkpoint.layout import LATEST, ORIGIN_KEY
from megatron.checkpoint.save import resolved_config_document
from megatron.checkpoint.save_weights import Division, save_weights
from megatron.config import config_from_dict
from megatron.config.size import padded_vocab_size
from megatron.convert.architecture import Architecture, Source
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.architectures.balance import import_notices
from megatron.convert.dropped import check_used, finite, head_name, untied_head
from megatron.convert.errors import ConversionError
from megatron.convert.imported_tokenizer import Fitting, ImportedTokenizer, import_tokenizer
from megatron.convert.json_files import read_json
from megatron.convert.layouts import Arranged
from megatron.convert.logits import LIMIT, Allowed, Compared, compare, first_rows, our_logits, their_logits, tokens_to_compare
from megatron.convert.mapping import Entry, to_ours
from megatron.convert.opened import open_checkpoint
from megatron.convert.shapes import Shapes, checked, model_shapes
from megatron.convert.staging import check_holds_no_run, checked_target, move_into, staged_run
from megatron.convert.tensor_files import StoredTensors
from megatron.convert.to_huggingface import AUTO, PRECISIONS
from megatron.convert.trust import foreign_code, own_class, refusal, without_code
from megatron.convert.unread import check_general, unread_settings, without_unread
from megatron.convert.upcycle import Upcycled, upcycle
from megatron.convert.vocabulary import with_new_rows
from megatron.data.locking import naming
from megatron.data.progress import Reporter, Stage
from megatron.data.tokenizer import Tokenizer
from megatron.kernels.precision import DTYPES
from megatron.training.memory import check_comparison_fits
from megatron.training.setup import checkpoint_args

CONFIG = "config.yml"
CONFIG_HEAD = "# The model of"
"""How that file begins when an import wrote it."""


@dataclass(frozen=True)
class Import:
    """What to read, and how to write it. `stages`: of a pipeline, with a file for each layer; 0: none. `upcycle`: keys that make experts of the dense
    MLPs; None: they stay."""

    input_dir: Path
    output_dir: Path
    precision: str = AUTO
    tensor_parallel: int = 1
    stages: int = 0
    upcycle: Mapping[str, Any] | None = None
    check: bool = True
    fitting: Fitting = Fitting()  # noqa: RUF009 -- it has no state that changes
    """What is to be done about tokens without rows."""
    force: bool = False
    """Writes into a directory that is there already."""
    trust_remote_code: bool = False
    """Runs Python code that lies in `input_dir`, if its config.json asks for some, to compare the logits."""


@dataclass(frozen=True)
class Imported:
    """What was written."""

    path: Path
    config_file: Path
    class_name: str
    compared: Compared | None
    """None where the comparison was not wanted."""
    notices: tuple[str, ...] = ()
    is_upcycled: bool = False


class Theirs(NamedTuple):
    """A directory of Hugging Face's: the table that reads it, config.json with all defaults, the weights."""

    architecture: Architecture
    settings: dict[str, Any]
    stored: StoredTensors

    def keys(self) -> dict[str, Any]:
        """Our keys for its config.json. Raises ConversionError, also for a setting that is missing or of another type."""
        try:
            return self.architecture.keys(self.settings)
        except ConversionError:
            raise
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ConversionError(f"{self.stored.directory / 'config.json'}: a setting is missing or is not a number ({error}).") from error


def open_theirs(directory: Path) -> Theirs:
    """Raises ConversionError for a directory that holds no model, or one that no table is for."""
    settings = read_settings(directory)
    architecture, stored = architecture_of(settings), StoredTensors(directory)
    layers, weights = settings.get("num_hidden_layers"), len(stored.names)
    if isinstance(layers, int) and layers > weights:
        raise ConversionError(f"{directory / 'config.json'} says num_hidden_layers {layers}, but the directory holds only {weights} weights.")
    if settings.get("quantization_config"):
        raise ConversionError(
            f"{directory} holds quantized weights (quantization_config), which cannot be converted. Convert the model before quantization."
        )
    return Theirs(architecture, settings, stored)


def import_model(request: Import, reporter: Reporter) -> Imported:
    """Writes <output_dir>/global_step0, config.yml and the tokenizer, and compares the logits of what was written with Hugging Face's.

    Raises ConversionError, CheckpointError, ConfigError, TokenizerError; what was written is removed then.
    """
    target = checked_target(request.output_dir, force=request.force, to_do="write into")
    check_holds_no_run(target, CONFIG, CONFIG_HEAD)
    theirs = open_theirs(request.input_dir)
    found = foreign_code(request.input_dir, theirs.architecture)
    if found is not None and request.check and not request.trust_remote_code:
        raise ConversionError(refusal(found, theirs.architecture))
    with naming(target.parent), staged_run(target) as stage:
        imported = _written(request, theirs, stage, reporter)
        move_into(stage, target, last=LATEST)
    if found is not None and not request.check:
        unrun = f"{found}. This code did not run. The weights were read as those of {theirs.architecture.class_name}, and no logits were compared."
        imported = replace(imported, notices=(unrun, *imported.notices))
    return imported


def _written(request: Import, theirs: Theirs, stage: Path, reporter: Reporter) -> Imported:
    architecture, settings, stored = theirs
    rows, fitting = settings["vocab_size"], replace(request.fitting, multiple=request.tensor_parallel)
    tokens = import_tokenizer(request.input_dir, stage, request.output_dir, rows=rows, fitting=fitting)
    keys: dict[str, Any] = {**theirs.keys(), **tokens.keys}
    precision = precision_of(request, settings)
    keys |= {"precision": precision, "make_vocab_size_divisible_by": 1}
    source = Source(config_from_dict(keys), rows)
    notices = list(settings_notices(theirs))
    if (head := untied_head(architecture, source, stored)) is not None:
        keys["no_weight_tying"] = True
        source = Source(config_from_dict(keys), source.vocabulary)
        notices.append(
            f"config.json says tie_word_embeddings, but {head} differs from the embedding. Both weights are kept (no_weight_tying: true), "
            "as transformers does."
        )
    table = list(architecture.table(source))
    arranged = Arranged(stored, table, source)
    tied = None if source.config.model.no_weight_tying else head_name(architecture, source)
    later = later_layers(settings, stored)
    check_used(table, arranged, source, tied=tied, later=later)
    weights = with_new_rows(converted(table, arranged, model_shapes(source), DTYPES[precision]), tokens.rows)
    keys["make_vocab_size_divisible_by"] = divisor(tokens.tokenizer, tokens.total(rows))
    source = Source(config_from_dict(keys), tokens.total(rows))
    upcycled: Upcycled | None = None
    if request.upcycle is not None:
        upcycled = upcycle(source, request.upcycle, keys)
        keys, source, weights = upcycled.keys, upcycled.source, upcycled.weights(weights)
    if request.check:
        check_comparison_fits(source.config, source.vocabulary)
    with reporter.stage("weights", None) as progress:
        path = save(request, stage, source, _counted(weights, progress), origin=architecture.name)
    (stage / CONFIG).write_text(config_text(request, keys))
    limit = LIMIT if upcycled is None or upcycled.is_exact else math.inf
    compared = compare_logits(request, theirs, stage, tokens, limit=limit) if request.check else None
    return Imported(
        request.output_dir / path.name,
        request.output_dir / CONFIG,
        architecture.class_name,
        compared,
        (
            *tokens.notices,
            *notices,
            *later_notice(later, settings),
            *(upcycled.notices if upcycled is not None else import_notices(settings, source.config.moe)),
        ),
        is_upcycled=upcycled is not None,
    )


def read_settings(directory: Path) -> dict[str, Any]:
    """config.json with the defaults of its class filled in. Raises ConversionError."""
    file = directory / "config.json"
    if not directory.is_dir():
        raise ConversionError(f"{directory} is not a directory: give a directory with config.json and weights (to download one: hf download NAME).")
    try:
        given = json.loads(file.read_text())
        model_type = given["model_type"]
    except FileNotFoundError:
        raise ConversionError(
            f"{file} is missing, so {directory} is not a Hugging Face model. Give a directory with config.json and weights."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{file} is damaged: its model_type cannot be read ({error}).") from error
    if not isinstance(model_type, str):
        raise ConversionError(f"{file}: model_type is {model_type!r}, which is not a name.")
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        return dict(given)
    settings = {key: value for key, value in given.items() if key not in ("model_type", "transformers_version", "architectures")}
    try:
        read, known = AutoConfig.for_model(model_type, **settings).to_dict(), AutoConfig.for_model(model_type).to_dict()
    except Exception as error:  # each class checks in its own way
        raise ConversionError(f"{file} is refused by transformers: {' '.join(str(error).split())}.") from error
    check_general(read, known, file)
    return {**without_unread(read, known), "architectures": given.get("architectures")}


def settings_notices(theirs: Theirs) -> Iterator[str]:
    """Sentences on settings of its config.json that its class does not read."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if (model_type := theirs.architecture.model_type) in CONFIG_MAPPING:
        given = read_json(theirs.stored.directory / "config.json")
        yield from unread_settings(given, AutoConfig.for_model(model_type).to_dict(), theirs.architecture.class_name)


def architecture_of(settings: Mapping[str, Any]) -> Architecture:
    """The table for a config.json. Raises ConversionError for a model_type that there is none for."""
    by_type = {architecture.model_type: architecture for architecture in ARCHITECTURES.values()}
    if settings["model_type"] not in by_type:
        raise ConversionError(f"model_type {settings['model_type']} cannot be read; known are {', '.join(sorted(by_type))}.")
    return by_type[settings["model_type"]]


def precision_of(request: Import, settings: Mapping[str, Any]) -> str:
    """Our name of the number format. Raises ConversionError for an unknown one."""
    if request.precision != AUTO:
        if request.precision not in PRECISIONS:
            raise ConversionError(f"--precision {request.precision}: must be {AUTO} or one of {', '.join(PRECISIONS)}.")
        return PRECISIONS[request.precision]
    stored = str(settings.get("dtype") or settings.get("torch_dtype") or "float32").removeprefix("torch.")
    return {"bfloat16": "bfloat16", "float16": "fp16"}.get(stored, "fp32")


def read_keys(file: Path) -> dict[str, Any]:
    """The keys of a YAML file that is no whole configuration. Raises ConversionError."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConversionError(f"{file} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConversionError(f"{file} holds no keys. Write keys such as moe_num_experts: 4.")
    return {key.replace("-", "_"): value for key, value in content.items()}


def later_layers(settings: Mapping[str, Any], stored: StoredTensors) -> list[str]:
    """Weights of layers after the last, which predict the token after the next one (GLM-4.5); transformers' class leaves them out as well."""
    first = settings["num_hidden_layers"]
    layers = range(first, first + int(settings.get("num_nextn_predict_layers") or 0))
    predicting = [layer for layer in layers if f"model.layers.{layer}.eh_proj.weight" in stored.names]
    return [name for name in stored.names for layer in predicting if name.startswith(f"model.layers.{layer}.")]


def later_notice(later: list[str], settings: Mapping[str, Any]) -> Iterator[str]:
    """A sentence on what is left out, if anything."""
    if later:
        yield (
            f"{len(later)} weights of layers after the model's {settings['num_hidden_layers']} are left out ({later[0]}, ...). They predict the "
            "token after the next one (num_nextn_predict_layers); transformers leaves them out too."
        )


def divisor(tokenizer: Tokenizer | None, rows: int) -> int:
    """`make_vocab_size_divisible_by` that pads the tokenizer's vocabulary to as many rows as the model has. `tokenizer` None: each is a token."""
    if tokenizer is None:
        return next(size for size in (128, 64, 8, 1) if rows % size == 0)
    for size in (128, 64, 32, 16, 8, 256, 512, 1024, 1):
        if padded_vocab_size(tokenizer.vocab_size, size) == rows:
            return size
    return rows  # any tokenizer with fewer entries is padded to it


def in_order(table: list[Entry]) -> list[Entry]:
    """Layer by layer as they lie on disk: the last norm and the head after the layers."""
    return sorted(table, key=lambda entry: -1 if entry.ours is None else int(entry.ours.split(".")[1]))


def save(request: Import, stage: Path, source: Source, weights: Iterator[tuple[str, Tensor]], *, origin: str) -> Path:
    """The checkpoint; it says what architecture it came from, to be that one again where several would hold it."""
    args = {**checkpoint_args(source.config, source.vocabulary), "model_parallel_size": request.tensor_parallel}
    division = Division(request.tensor_parallel, request.stages, source.config.model.gpt_j_residual)
    documents = resolved_config_document(source.config.flat())
    state = {"iteration": 0, "args": args, ORIGIN_KEY: origin}
    return save_weights(stage, weights, client_state=state, documents=documents, division=division)


def config_text(request: Import, keys: Mapping[str, Any]) -> str:
    """The YAML to go on with."""
    head = (
        f"{CONFIG_HEAD} {request.input_dir}. To train it further, give this file together with a file that says how (data, batch size,\n"
        "# optimizer, train_iters, save, checkpoint_factor):\n"
        f"#   python deepy.py train.py {request.output_dir / CONFIG} how.yml\n"
    )
    return head + yaml.safe_dump({**keys, "load": str(request.output_dir), "finetune": True}, sort_keys=False)


def compare_logits(request: Import, theirs: Theirs, stage: Path, tokens: ImportedTokenizer, *, limit: float) -> Compared:
    """The checkpoint that was written against Hugging Face's model, on the rows that both have. Raises ConversionError where they differ by more than
    `limit`.
    """
    opened = open_checkpoint(stage)
    known = opened.source.vocabulary if tokens.rows is None else tokens.rows.first
    texts, dtype = tokens_to_compare(replace(opened.source, vocabulary=known), tokens.tokenizer), DTYPES[opened.source.config.precision]
    ours = our_logits(opened.source, opened.weights.read, texts)
    later = {name[: name.index(".", len("model.layers."))] + "." for name in later_layers(theirs.settings, theirs.stored)}
    allowed = Allowed(request.trust_remote_code, later)
    with loadable(theirs, trusted=request.trust_remote_code) as (folder, loader):
        both = ours, their_logits(folder, texts, precision=dtype, loader=loader, allowed=allowed)
        return compare(*(both if tokens.rows is None else (first_rows(logits, known) for logits in both)), limit=limit)


@contextmanager
def loadable(theirs: Theirs, *, trusted: bool) -> Iterator[tuple[Path, Any]]:
    """The folder as transformers may load it, and the class that loads it: the folder itself with the code in it only where that is trusted."""
    directory = theirs.stored.directory
    if trusted and foreign_code(directory, theirs.architecture) is not None:
        from transformers import AutoModelForCausalLM

        yield directory, AutoModelForCausalLM
        return
    with without_code(theirs.stored) as folder:
        yield folder, own_class(theirs.architecture)


def described(imported: Imported) -> Iterator[str]:
    """What a user should see at the end."""
    yield from imported.notices
    yield f"{imported.path}: weights of {imported.class_name}; {imported.config_file}: the configuration of this model."
    if imported.compared is not None:
        yield f"Compared with the {'dense model' if imported.is_upcycled else 'original'}: {imported.compared}."
    if imported.compared is not None and imported.is_upcycled:
        yield f"Upcycling: the largest relative difference of the logits is {imported.compared.relative:.1e} (of the dense model's largest logit)."


def converted(table: list[Entry], stored: Arranged, shapes: Shapes, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Our weights, layer by layer. Raises ConversionError, also for other shapes than the configuration asks for and numbers that are not finite."""
    for named in to_ours(in_order(table), stored.read):
        tensor = checked(named.name, named.tensor, shapes)
        kept = tensor if shapes[named.name].whole else tensor.to(torch.float32 if named.exact else dtype)
        yield named.name, finite(named.name, tensor, kept)


def _counted(weights: Iterator[tuple[str, Tensor]], progress: Stage) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        progress.advance(tensor.nbytes, 0)
        yield name, tensor
