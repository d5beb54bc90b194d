"""YAML files and command-line overrides -> NeoXConfig, with every problem in one message."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron.config.aliases import RENAMED, judge
from megatron.config.coerce import as_declared
from megatron.config.components import did_you_mean
from megatron.config.messages import describe_rules, describe_types
from megatron.config.neox import OWNER, SECTION_CLASSES, NeoXConfig
from megatron.config.section import ConfigError, Section
from megatron.config.source import Source, apply_overrides, find_file, merge, parse, read_text


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration with what it was made of.

    files: file name -> text, as written; overrides: the `key=value` given on the command line; notices: sentences about keys without effect.
    """

    config: NeoXConfig
    files: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def load_config(paths: Sequence[Path | str], overrides: Sequence[str] = (), conf_dir: Path | None = None) -> LoadedConfig:
    """The configuration that the files and overrides describe together.

    Files: YAML, NeoX's JSON with comments, or JSON; `.yml` may be left out; relative to `conf_dir` when given. A key may stand in one file only
    (hyphens and underscores are the same); `key=value` overrides win over files. Raises ConfigError with every problem found.
    """
    problems: list[str] = []
    files: dict[str, str] = {}
    sources: list[Source] = []
    for path in (find_file(name, conf_dir) for name in paths):
        if path.name in files:
            problems.append(f"{path}: a second file named '{path.name}'; they are saved side by side in checkpoints, so rename one")
            continue
        text = read_text(path, problems)
        files[path.name] = text or ""
        sources.append(Source(damaged=True) if text is None else _rename(parse(text, str(path), problems), problems))
    source = merge(sources, problems)
    renamed = [_renamed_override(override) for override in overrides]
    apply_overrides(source, renamed, problems)
    config, notices = _build(source, problems)
    return LoadedConfig(config, files, tuple(overrides), tuple(notices))


def config_from_dict(values: dict[str, Any]) -> NeoXConfig:
    """The configuration of flat keys, as in YAML. Raises ConfigError with every problem found."""
    problems: list[str] = []
    source = _rename(Source(values=dict(values)), problems)
    return _build(source, problems)[0]


def _rename(source: Source, problems: list[str]) -> Source:
    """NeoX's other names for a key become the one that the sections know."""
    for key in [key for key in source.values if key in RENAMED]:
        new = RENAMED[key]
        if new in source.values:
            where = source.place_of((key,))
            problems.append(f"{f'{where}: ' if where else ''}'{key}' is another name of '{new}', which is given as well")
        else:
            source.values[new] = source.values[key]
            source.places.update({(new, *path[1:]): place for path, place in source.places.items() if path[0] == key})
        source.drop(key)
    return source


def _renamed_override(override: str) -> str:
    name, equals, value = override.partition("=")
    return RENAMED.get(name.strip().replace("-", "_"), name) + equals + value


def _build(source: Source, problems: list[str]) -> tuple[NeoXConfig, list[str]]:
    notices: list[str] = []
    for key in list(source.values):
        if key in OWNER:
            continue
        where = source.place_of((key,))
        prefix = f"{where}: " if where else ""
        verdict = judge(key, source.values[key])
        if verdict is None:
            problems.append(f"{prefix}unknown key '{key}'{did_you_mean(key, OWNER)}")
        elif verdict.refused:
            problems.append(prefix + verdict.sentence)
        elif verdict.sentence:
            notices.append(prefix + verdict.sentence)
        source.drop(key)
    _import_plugins(source, problems)
    broken: set[str] = set()
    sections = {name: _build_section(name, section, source, broken, problems) for name, section in SECTION_CLASSES.items()}
    if any(section is None for section in sections.values()):
        raise ConfigError(problems)
    try:
        config = NeoXConfig(**sections)  # type: ignore[arg-type]
    except ValidationError as error:
        problems.extend(describe_rules(error, source, _defaults(), without=broken))
    if problems:
        raise ConfigError(problems)
    return config, notices


def _build_section(name: str, section: type[Section], source: Source, broken: set[str], problems: list[str]) -> Section | None:
    """One section. Keys with a value of the wrong type are reported, added to `broken` and left out, so that rules about others still speak."""
    given = {key: as_declared(value, section.model_fields[key].annotation) for key, value in source.values.items() if OWNER[key] == name}
    source.values.update(given)
    try:
        return section(**given)
    except ValidationError as error:
        problems.extend(describe_types(error, section, source))
        wrong = {str(details["loc"][0]) for details in error.errors(include_url=False) if details["loc"]}
    broken |= wrong
    usable = {key: value for key, value in given.items() if key not in wrong}
    try:
        return section(**usable)
    except ValidationError as error:
        problems.extend(describe_rules(error, source, _defaults(), without=broken))
        return None


def _defaults() -> dict[str, Any]:
    fields = {key: field for section in SECTION_CLASSES.values() for key, field in section.model_fields.items()}
    values = {key: field.get_default(call_default_factory=True) for key, field in fields.items() if not field.is_required()}
    return {key: value.model_dump() if isinstance(value, Section) else value for key, value in values.items()}


def _import_plugins(source: Source, problems: list[str]) -> None:
    """Imports the modules that register further routers, experts and losses, before names are checked."""
    names = source.values.get("plugins")
    for name in names if isinstance(names, list) else []:
        if not isinstance(name, str):
            continue  # the section says that it must be text
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a person's module may raise
            where = source.place_of(("plugins",))
            text = f"'plugins' = '{name}': {_why_not_imported(name, error)}"
            problems.append(f"{where}: {text}" if where else text)


def _why_not_imported(name: str, error: Exception) -> str:
    """A plugin that is not there, or what went wrong in which line of which file."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}."):
        return f"cannot be imported ({error}); install it or put its folder on PYTHONPATH"
    if isinstance(error, SyntaxError) and error.filename:
        return f"cannot be read: {error.filename}:{error.lineno}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 2 else ""
    return f"fails when imported{place}: {type(error).__name__}: {error}"
