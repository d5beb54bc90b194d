"""A checkpoint of ours, ready to be converted: its configuration and its weights, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron.checkpoint import layout
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layerwise import LayerwiseWeights
from megatron.checkpoint.manifest import damage
from megatron.checkpoint.weights import Expected, read_config
from megatron.config import NeoXConfig, config_from_dict, load_config
from megatron.config.source import parse
from megatron.convert.architecture import Source
from megatron.convert.errors import ConversionError
from megatron.convert.trust import OPTION

EMBEDDING = "sequential.0.word_embeddings.weight"


class Opened(NamedTuple):
    """A checkpoint, and the model that it is of."""

    path: Path
    source: Source
    weights: LayerwiseWeights

    @property
    def origin(self) -> str | None:
        """The architecture that the model was imported as, before any training. None: it began here."""
        origin = self.weights.client_state.get(layout.ORIGIN_KEY)
        return origin if isinstance(origin, str) else None


def open_checkpoint(directory: Path, config_files: Sequence[Path] = (), *, trusted: bool = False) -> Opened:
    """`directory`: a checkpoint (global_step100), or the directory of a run, of which `latest` names one.

    `trusted`: modules that the checkpoint's own configuration names under `plugins` are imported.

    The configuration is the one that the checkpoint holds (of GPT-NeoX's: its YAML files), or that of `config_files`.
    Raises CheckpointError, ConfigError and ConversionError.
    """
    if layout.looks_like_checkpoint(directory):
        path = directory
        if problems := damage(path):
            raise ConversionError(" ".join(problems[:2]))
    else:
        path = find_checkpoint(directory)
    config = checkpoint_config(path, config_files, trusted=trusted)
    weights = LayerwiseWeights(path, Expected(parallel_residual=config.model.gpt_j_residual, gqa_layout=config.checkpoint.gqa_layout))
    if EMBEDDING not in weights.names:
        raise ConversionError(f"{path} holds no {EMBEDDING}: it is not a language model in GPT-NeoX's layout.")
    return Opened(path, Source(config, weights.read(EMBEDDING).shape[0]), weights)


def checkpoint_config(path: Path, config_files: Sequence[Path], *, trusted: bool = False) -> NeoXConfig:
    """What describes the model of a checkpoint. Raises ConfigError, and ConversionError where nothing does, or where it names plugins, whose code
    would run, and is not `trusted`."""
    if config_files:
        return load_config(config_files).config
    if resolved := read_config(path):
        check_no_plugins(path / layout.CONFIGS / layout.RESOLVED_CONFIG, resolved, trusted=trusted)
        return config_from_dict(resolved)
    written = sorted(file for ending in ("yml", "yaml", "json") for file in (path / layout.CONFIGS).glob(f"*.{ending}"))
    if not written:
        raise ConversionError(f"{path} holds no configuration ({layout.CONFIGS}/): give its YAML files with --config_file.")
    for file in written:
        check_no_plugins(file, parse(file.read_text(encoding="utf-8", errors="replace"), str(file), []).values, trusted=trusted)
    return load_config(written).config


def check_no_plugins(file: Path, keys: Mapping[str, Any], *, trusted: bool) -> None:
    """Raises ConversionError for a configuration inside a checkpoint that names modules to import."""
    if (names := keys.get("plugins")) and not trusted:
        raise ConversionError(
            f"{file} names plugins ({', '.join(map(str, names)) if isinstance(names, list) else names}). Their code would run here. If "
            "you trust the person who "
            f"wrote this checkpoint, add {OPTION}. Otherwise give your own configuration with --config_file."
        )
