"""Command lines: what deepy.py does, and how a worker script gets its configuration."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from megatron.config.loader import LoadedConfig, load_config
from megatron.config.neox import OWNER, check_trainable, data_parallel_size
from megatron.config.section import ConfigError
from megatron.config.source import canonical
from megatron.config.training import resolve_batch
from megatron.config.transport import decode
from megatron.launcher import local
from megatron.launcher.dry_run import dry_run
from megatron.launcher.implementations import check_backends
from megatron.launcher.machines import machines
from megatron.launcher.plan import machine_notices, plan_launch, runs_elsewhere, worker_count
from megatron.launcher.processes import Machine, run_until_done, survey
from megatron.mpu.environment import complete_environment

# NeoX's flags that stand for a key; the flag's value wins over the files like any override.
KEY_FLAGS = {
    "--wandb_group": "wandb_group",
    "--wandb_run_name": "wandb_run_name",
    "--wandb_team": "wandb_team",
    "--iteration": "iteration",
    "--eval_tasks": "eval_tasks",
    "--eval_data": "eval_data",
    "--eval_results_prefix": "eval_results_prefix",
    "--hostfile": "hostfile",
    "--sample_input_file": "sample_input_file",
    "--sample_output_file": "sample_output_file",
    "--autotuning": "autotuning_run",
}
_REFUSED = ("--autotuning",)
"""Flags that are read so that the refusal of their key can say what to do; --help does not offer them."""
_SHORT = {"--hostfile": "-H", "--sample_input_file": "-i"}
HOME = Path(__file__).resolve().parents[2]
"""Where deepy.py and the other scripts lie."""
_CONFIGURATIONS = (".yml", ".yaml", ".json")
_SCRIPTS = {
    "train": "Train a model",
    "eval": "Measure a trained model on the texts that eval_text_files names, and on tasks of lm-evaluation-harness (eval_tasks)",
    "generate": "Let a trained model write text; the key text_gen_type says after which prompts",
    "serve": "Answer requests for text over HTTP, in the form of OpenAI's API, and show a page with the experts of each token",
}
"""What each script does, for its --help."""
_USAGE_STATUS = 2
_PLAIN_WIDTH = 140  # of the summary when it goes to a file or pipe


@dataclass(frozen=True)
class Request:
    """A command line, taken apart: the words that are not options, and how to load the configuration."""

    words: tuple[str, ...]
    conf_dir: Path | None
    overrides: tuple[str, ...]
    check: bool
    dry_run: bool
    transported: str | None


def main(argv: Sequence[str]) -> int:
    """deepy.py: load and check the configuration, then run the script with it. Returns the exit status; 2 for a mistake in the input."""
    request = read_deepy_arguments(argv)
    parser = _deepy_parser()
    script = find_script(request.words[0])
    if script is None:
        _stop(parser, missing_script(request))
    try:
        loaded = load_request(request, request.words[1:])
        machine = survey()
        processes = worker_count(loaded, machine)
        launcher = loaded.config.launcher
        check_backends(loaded, None if runs_elsewhere(launcher, machines(launcher, machine)) else machine.device_type)
        if request.check:
            return _show_check(loaded, machine, processes)
        if script.stem == "train":
            check_trainable(loaded.config, data_parallel_size(loaded.config, processes))
        notices = machine_notices(loaded, machine)
        launch = plan_launch(script, loaded, machine, ask=not request.dry_run)
    except ConfigError as error:
        _stop(parser, str(error))
    for notice in notices:
        sys.stderr.write(f"{parser.prog}: {notice}\n")
    if request.dry_run:
        sys.stdout.write(dry_run(launch))
        return 0
    if launch.replaces:
        os.execve(launch.argv[0], launch.argv, launch.env)
    if launch.program == local.PROGRAM:
        return local.main(local.arguments_of(launch.argv), launch.env)
    return run_until_done(launch.argv, launch.env, launch.processes, launch.stop)


def find_script(word: str) -> Path | None:
    """The script as given, else the one of that name beside deepy.py; None when neither is there."""
    return next((place for place in (Path(word), HOME / word) if place.is_file() and place.suffix not in _CONFIGURATIONS), None)


def missing_script(request: Request) -> str:
    """What is wrong with a command line whose first word is no script."""
    first, folder = Path(request.words[0]), beside(request.conf_dir) or Path()
    if first.suffix in _CONFIGURATIONS or any((folder / f"{first}{suffix}").is_file() for suffix in _CONFIGURATIONS):
        words = " ".join(request.words)
        return (
            f"{first} is a configuration file, but the script is missing: write the script first (train.py, eval.py or generate.py), "
            f"such as train.py {words}"
        )
    return (
        f"{first}: there is no such script, neither in this folder nor in the folder of deepy.py; the scripts are train.py, eval.py and generate.py"
    )


def beside(folder: Path | None) -> Path | None:
    """The folder of configurations as given, else the one of that name beside deepy.py; None stays None."""
    return HOME / folder if folder is not None and not folder.is_dir() and (HOME / folder).is_dir() else folder


def read_deepy_arguments(argv: Sequence[str]) -> Request:
    """deepy.py's command line: script and files are its words. Ends the process with status 2, as argparse does, when it cannot be understood."""
    parser = _deepy_parser()
    request = _take_apart(parser, argv)
    if not request.words:
        parser.error("give a script and its configuration files, such as: deepy.py train.py -d configs quickstart.yml")
    return request


def _deepy_parser() -> argparse.ArgumentParser:
    parser = _parser("deepy.py", "SCRIPT CONFIG [CONFIG ...]")
    parser.description = "Read the configuration, check it, and start SCRIPT with it, on as many processes as the configuration and the machine say."
    parser.add_argument("--check", action="store_true", help="show the complete configuration, sizes, memory, FLOPs and what computes, then stop")
    shown = "show the complete command and the environment of the processes on each machine, then stop; nothing is started"
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help=shown)
    return parser


def config_from_argv(argv: Sequence[str]) -> LoadedConfig:
    """The configuration of a worker script: from deepy.py's `--megatron_config`, or from YAML files and overrides given to the script itself.

    Mistakes are printed as sentences and end the process with status 2. The environment says afterwards which process this is (LaunchError where it
    cannot). `--local_rank` and `--deepspeed_config`, which launchers add, are accepted.
    """
    program = Path(sys.argv[0]).name or "train.py"
    parser = _parser(program, "CONFIG [CONFIG ...]")
    parser.description = (
        f"{_SCRIPTS.get(Path(program).stem, 'Read the configuration and work with it')}. This is one process; deepy.py starts several."
    )
    for flag in ("--local_rank", "--local-rank", "--deepspeed_config"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--megatron_config", help=argparse.SUPPRESS)
    request = _take_apart(parser, argv)
    try:
        loaded = load_request(request, request.words) if request.transported is None else decode(request.transported)
    except ConfigError as error:
        _stop(parser, str(error))
    launcher = loaded.config.launcher
    complete_environment(os.environ, master_addr=launcher.master_addr, master_port=launcher.master_port)
    return loaded


def _parser(program: str, positionals: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False, usage=f"{program} {positionals} [-d DIR] [-o key=value ...]")
    script = "the script (train.py, eval.py or generate.py), then its " if positionals.startswith("SCRIPT") else ""
    parser.add_argument("words", nargs="*", metavar=positionals, help=f"{script}YAML files; .yml may be left out")
    parser.add_argument("-d", "--conf_dir", type=Path, help="directory of the YAML files")
    wins = (
        "replaces the value in the files; key.inner=value sets a value in a dictionary (generate.py also takes NeoX's -o FILE, which "
        "is --sample_output_file)"
    )
    parser.add_argument("-o", "--override", nargs="+", action="append", default=[], metavar="key=value", help=wins)
    for flag, key in KEY_FLAGS.items():
        names = [*([_SHORT[flag]] if flag in _SHORT else []), flag, *([flag.replace("_", "-")] if flag == "--eval_data" else [])]
        said = argparse.SUPPRESS if flag in _REFUSED else f"the same as -o {key}=VALUE"
        parser.add_argument(*names, dest=f"key_{key}", metavar="VALUE", nargs="+" if key == "eval_tasks" else None, help=said)
    return parser


def _take_apart(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Request:
    arguments, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_as_override(unknown[0], argv)}")
    # `-o a=1 b.yml`: argparse hands everything up to the next option to -o; what is no assignment is a file.
    words = [*arguments.words, *(word for _, *rest in arguments.override for word in rest if "=" not in word)]
    script = Path(words[0] if words and parser.prog == "deepy.py" else parser.prog).stem
    overrides = []
    for first, *rest in arguments.override:
        neox_output = script == "generate" and "=" not in first and canonical(first) not in OWNER
        overrides.append(f"sample_output_file={json.dumps(first)}" if neox_output else first)
        overrides += [word for word in rest if "=" in word]
    for key in KEY_FLAGS.values():
        value = getattr(arguments, f"key_{key}")
        if value is not None:
            overrides.append(f"{key}={value if key == 'iteration' else json.dumps(value)}")
    if arguments.key_sample_input_file is not None and not any(canonical(override).startswith("text_gen_type=") for override in overrides):
        overrides.append("text_gen_type=input-file")  # whoever names prompts wants them, whatever text_generation.yml says
    check, dry = getattr(arguments, "check", False), getattr(arguments, "dry_run", False)
    return Request(tuple(words), arguments.conf_dir, tuple(overrides), check, dry, getattr(arguments, "megatron_config", None))


def _as_override(flag: str, argv: Sequence[str]) -> str:
    """How to give a key that was written like a flag (`--train_iters 5`, `--train-iters=5`); empty where the flag is no key."""
    name, _, value = flag.lstrip("-").partition("=")
    key = canonical(name)
    if not flag.startswith("--") or key not in OWNER:
        return ""
    following = argv[argv.index(flag) + 1 :]
    value = value or next((word for word in following[:1] if not word.startswith("-")), "VALUE")
    return f"; {key} is a key of the configuration: write {shlex.join(['-o', f'{key}={value}'])}"


def load_request(request: Request, names: Sequence[str]) -> LoadedConfig:
    """The configuration that files and overrides of a command line describe. Raises ConfigError."""
    if not names and not request.overrides:
        raise ConfigError(["no configuration files are given; write them after the script, such as: -d configs quickstart.yml"])
    return load_config(names, request.overrides, beside(request.conf_dir))


def _stop(parser: argparse.ArgumentParser, sentence: str) -> NoReturn:
    parser.exit(_USAGE_STATUS, f"{parser.prog}: {sentence}\n")


def _show_check(loaded: LoadedConfig, machine: Machine, processes: int) -> int:
    """Returns the exit status. Raises ConfigError where the batch sizes contradict each other; what is missing may be in another file."""
    from rich.console import Console

    from megatron.analysis.vocabulary import vocabulary
    from megatron.launcher.summary import summary

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    loaded = replace(loaded, notices=(*loaded.notices, *machine_notices(loaded, machine)))
    for part in summary(loaded, processes, vocabulary(loaded.config.data), machine.device_type):
        console.print(part, soft_wrap=isinstance(part, str))  # sentences stay in one line, tables keep to the width
    training = loaded.config.training
    if training.train_batch_size is not None or training.train_micro_batch_size_per_gpu is not None:
        resolve_batch(training, data_parallel_size(loaded.config, processes))
    return 0
