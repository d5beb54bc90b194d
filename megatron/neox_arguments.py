"""GPT-NeoX's `NeoXArgs` for people's own scripts: one object with an attribute for every key.

It stands in front of the typed configuration, which is what everything else here uses. Values are those that a run would use: the batch sizes worked
out, the precision resolved, `attention_config` one name a layer. Where NeoX fails with an assertion or a TypeError, this raises ConfigError with a
sentence for every problem. Importing it imports no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.config.aliases import TABLE, judge
from megatron.config.components import did_you_mean
from megatron.config.deepspeed import NEOX_KEYS
from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.launcher import LauncherConfig
from megatron.config.loader import LoadedConfig, load_config, load_values
from megatron.config.neox import NeoXConfig
from megatron.config.neox_defaults import NEOX_DEFAULTS
from megatron.config.section import ConfigError
from megatron.config.source import canonical
from megatron.config.training import resolve_batch
from megatron.config.transport import decode, encode
from megatron.launcher.command_line import load_request, read_deepy_arguments
from megatron.launcher.machines import find_hostfile
from megatron.launcher.multinode import Meeting, runner_options
from megatron.launcher.plan import worker_count
from megatron.launcher.processes import survey

# What DeepSpeed assumes where `zero_optimization` is silent, as NeoX tells it.
_ZERO = {"stage": 0, "reduce_scatter": True, "contiguous_gradients": False, "reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000}
# What a process or a script finds out while it runs and writes into the object; nothing here is worked out from other keys.
_RUN_TIME = frozenset(
    {
        "comet_experiment",
        "config_files",
        "curriculum_seqlen",
        "do_test",
        "do_train",
        "do_valid",
        "git_hash",
        "local_rank",
        "padded_vocab_size",
        "rank",
        "user_script",
        "world_size",
    }
)
# What follows from other keys and cannot be chosen.
_WORKED_OUT = frozenset(
    {"batch_size", "clip_grad", "deepspeed", "dynamic_loss_scale", "is_pipe_parallel", "lr", "optimizer_type"} | {f"zero_{key}" for key in _ZERO}
)
_DEEPSPEED_KEYS = NEOX_KEYS | {"deepspeed", "deepspeed_extra_args", "curriculum_seqlen"}
_RUNNER_KEYS = frozenset(LauncherConfig.model_fields) - {"plugins", "threads_per_process", "global_num_gpus"}


class NeoXArgs:
    """Every key as an attribute, to read and to write.

    A key that is written later does not change what was worked out from it before; it counts when the object is handed on
    (`get_deepspeed_main_args`, `deepspeed_config`), and is checked then. Names that are no key are ordinary attributes.
    """

    def __init__(self, **values: Any) -> None:
        """Keys and values as in a YAML file. Raises ConfigError with every problem found."""
        given = {canonical(key): value for key, value in values.items()}
        run_time = {key: value for key, value in given.items() if key in _RUN_TIME}
        worked_out = {key: value for key, value in given.items() if key in _WORKED_OUT}
        loaded = load_values({key: value for key, value in given.items() if key not in run_time and key not in worked_out})
        self._take(replace(loaded, files=run_time.get("config_files") or {}), run_time)
        _check_worked_out(worked_out, self._values)

    def _take(self, loaded: LoadedConfig, run_time: Mapping[str, Any]) -> None:
        values = _resolve(loaded) | dict(run_time)
        self.__dict__.update(_loaded=loaded, _values=values, _changed={key: value for key, value in run_time.items() if value is not None})

    # ---------------------------------------------------------------- making one

    @classmethod
    def from_ymls(cls, paths_to_yml_files: Sequence[str | Path], overwrite_values: Mapping[str, Any] | None = None) -> NeoXArgs:
        """The object that configuration files describe together; `overwrite_values` win over the files."""
        return cls._of(load_config([Path(path) for path in paths_to_yml_files], _as_overrides(overwrite_values)), overwrite_values)

    @classmethod
    def from_dict(cls, args_dict: Mapping[str, Any]) -> NeoXArgs:
        """The object that keys and values describe, also those of another object's `all_config`."""
        return cls(**args_dict)

    @classmethod
    def consume_deepy_args(cls, input_args: Sequence[str] | None = None) -> NeoXArgs:
        """The object that deepy.py's command line describes. `input_args` None: this process's own arguments."""
        request = read_deepy_arguments(sys.argv[1:] if input_args is None else input_args)
        script, *names = request.words
        if not Path(script).is_file():
            raise ConfigError([f"{script}: no such script"])
        return cls._of(load_request(request, names), {"user_script": script})

    @classmethod
    def consume_neox_args(cls, overwrite_values: Mapping[str, Any] | None = None, input_args: Sequence[str] | None = None) -> NeoXArgs:
        """The object that deepy.py, or `get_deepspeed_main_args`, handed to this worker process. `input_args` None: the process's own arguments."""
        parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        parser.add_argument("--megatron_config")
        text = parser.parse_known_args(None if input_args is None else list(input_args))[0].megatron_config
        if text is None:
            raise ConfigError(["--megatron_config is missing: start the script with deepy.py, or make the object with from_ymls"])
        loaded = decode(text)
        handed_on = {key: value for key, value in loaded.without_section.items() if key in _RUN_TIME}
        args = cls._of(loaded, {"user_script": sys.argv[0] if input_args is None else None} | handed_on)
        if overwrite_values:
            args.update_values(overwrite_values)
            args = cls._of(args._current(), args._changed)
        return args

    @classmethod
    def _of(cls, loaded: LoadedConfig, run_time: Mapping[str, Any] | None) -> NeoXArgs:
        args = cls.__new__(cls)
        args._take(loaded, {"config_files": loaded.files} | {key: value for key, value in (run_time or {}).items() if key in _RUN_TIME})
        return args

    # ---------------------------------------------------------------- reading and writing

    def __getattr__(self, key: str) -> Any:
        values = self.__dict__.get("_values", {})
        if values and key in self._loaded.without_section and key not in self._changed:
            return self._loaded.without_section[key]  # as it was written, other names included
        if key in values:
            return values[key]
        raise AttributeError(f"NeoXArgs has no '{key}'{did_you_mean(key, values)}")

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self._values:
            self._values[key] = self._changed[key] = value
        else:
            self.__dict__[key] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeoXArgs) and self._values == other._values

    __hash__ = None  # type: ignore[assignment]  # its values change

    def __repr__(self) -> str:
        return f"NeoXArgs({', '.join(f'{key}={value!r}' for key, value in sorted(self._loaded.config.given().items()))})"

    def update_value(self, key: str, value: Any) -> None:
        """Writes a key. Raises ConfigError for a name that is no key."""
        if key not in self._values:
            raise ConfigError([f"unknown key '{key}'{did_you_mean(key, self._values)}"])
        setattr(self, key, value)

    def update_values(self, values: Mapping[str, Any]) -> None:
        """Writes several keys."""
        for key, value in values.items():
            self.update_value(key, value)

    def configure_distributed_args(self) -> None:
        """Takes `rank`, `local_rank` and `world_size` from the environment that a launcher makes; one process where there is none."""
        self.update_values(_process())

    # ---------------------------------------------------------------- handing on

    @property
    def all_config(self) -> dict[str, Any]:
        """Every key with its value. `from_dict` of it is equal to this object."""
        return dict(self._values)

    @property
    def megatron_config(self) -> dict[str, Any]:
        """The keys that are neither DeepSpeed's nor its launcher's."""
        return {key: value for key, value in self._values.items() if key not in _DEEPSPEED_KEYS | _RUNNER_KEYS}

    @property
    def deepspeed_runner(self) -> dict[str, Any]:
        """The keys of DeepSpeed's launcher."""
        return {key: value for key, value in self._values.items() if key in _RUNNER_KEYS}

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """What DeepSpeed is initialised with."""
        current = self._current()
        return deepspeed_config(current.config, worker_count(current, survey()))

    def get_deepspeed_main_args(self) -> list[str]:
        """Arguments for `deepspeed.launcher.runner.main`: its options, `user_script`, and this object for `consume_neox_args`."""
        if self.user_script is None:
            raise ConfigError(["'user_script' must be given: the script that the processes run"])
        current = self._current()
        launcher = current.config.launcher
        options = runner_options(launcher, find_hostfile(launcher), Meeting(launcher.master_addr, launcher.master_port))
        return [*options, str(self.user_script), "--megatron_config", encode(current)]

    def _current(self) -> LoadedConfig:
        """What was loaded, with the keys that were written since. Raises ConfigError for what does not fit."""
        changed = {key: value for key, value in self._changed.items() if key not in _WORKED_OUT}
        for key, value in changed.items():
            _check_plain(key, value)
        keys = {key: value for key, value in changed.items() if key not in _RUN_TIME}
        given = {**self._loaded.config.given(), **keys}
        loaded = load_values({key: value for key, value in given.items() if value is not None})
        found = {key: value for key, value in changed.items() if key in _RUN_TIME and key != "config_files"}
        others = {**self._loaded.without_section, **loaded.without_section, **found}
        return replace(self._loaded, config=loaded.config, files=self._values["config_files"], without_section=others)


def _as_overrides(values: Mapping[str, Any] | None) -> list[str]:
    given = {key: value for key, value in (values or {}).items() if canonical(key) not in _RUN_TIME}
    for key, value in given.items():
        _check_plain(key, value)
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def _check_plain(key: str, value: Any) -> None:
    """Raises ConfigError for a value that cannot be written down."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"'{key}' = {value!r}: only numbers, texts, lists and dictionaries can be handed to other processes"]) from error


def _resolve(loaded: LoadedConfig) -> dict[str, Any]:
    """Every key of ours and of NeoX's with the value that a run would use."""
    config = loaded.config
    given = config.given()
    values = dict.fromkeys([*TABLE, *_RUN_TIME]) | NEOX_DEFAULTS | config.flat()
    values |= {key: given.get(key) for key in values if key in NEOX_KEYS and isinstance(values[key], dict)}
    values["deepspeed_extra_args"] = values["deepspeed_extra_args"] or None
    values |= given | {key: value for key, value in loaded.without_section.items() if key in TABLE} | {"precision": config.precision}
    return values | _worked_out(config, worker_count(loaded, survey())) | {"config_files": loaded.files} | _process()


def _worked_out(config: NeoXConfig, processes: int) -> dict[str, Any]:
    """The keys that follow from others."""
    training, data, optimizer = config.training, config.data, config.optimizer
    zero = _ZERO | optimizer.zero_optimization.model_dump(mode="json", exclude_unset=True)
    batch = None if training.train_batch_size is None and training.train_micro_batch_size_per_gpu is None else resolve_batch(training, processes)
    sizes = {} if batch is None else {"train_batch_size": batch.global_, "gradient_accumulation_steps": batch.accumulation}
    micro = None if batch is None else batch.micro
    weights = {
        f"{part}_data_weights": _weights(getattr(data, f"{part}_data_paths"), getattr(data, f"{part}_data_weights"))
        for part in ("train", "valid", "test")
    }
    return {
        **sizes,
        **weights,
        **{f"zero_{key}": zero[key] for key in _ZERO},
        "train_micro_batch_size_per_gpu": micro,
        "batch_size": micro,
        "global_num_gpus": processes,
        "clip_grad": optimizer.gradient_clipping,
        "optimizer_type": optimizer.optimizer.type,
        "lr": optimizer.optimizer.params.lr,
        "dynamic_loss_scale": config.precision == "fp16" and not (optimizer.fp16 is not None and optimizer.fp16.loss_scale),
        "is_pipe_parallel": config.parallel.pipe_parallel_size >= 1,
        "attention_config": config.model.attention_types,
        "text_gen_type": config.inference.text_gen_type or ("unconditional" if config.inference.sample_input_file is None else "input-file"),
        "deepspeed": True,
    }


def _weights(paths: list[str] | None, weights: list[float] | None) -> list[float] | None:
    return weights if weights is not None or not paths else [1.0] * len(paths)


def _check_worked_out(given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises ConfigError for a key that was given another value than the one that follows from the others."""
    wrong = [key for key, value in given.items() if value is not None and value != values[key]]
    verdicts = [judge(key, given[key]) for key in wrong]
    if problems := [verdict.sentence for verdict in verdicts if verdict is not None and verdict.refused]:
        raise ConfigError(problems)


def _process() -> dict[str, int]:
    names = {"rank": ("RANK", 0), "local_rank": ("LOCAL_RANK", 0), "world_size": ("WORLD_SIZE", 1)}
    return {key: int(os.environ.get(name, default)) for key, (name, default) in names.items()}
