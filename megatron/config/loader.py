"""YAML files and command-line overrides -> NeoXConfig, with every problem in one message."""

from __future__ import annotations

import importlib
import traceback
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron.config.aliases import RENAMED, judge
from megatron.config.coerce import as_declared, without_python_none
from megatron.config.components import did_you_mean
from megatron.config.messages import describe_rules, describe_types
from megatron.config.names import add_implied, resolve_names, written_names
from megatron.config.neox import OWNER, SECTION_CLASSES, NeoXConfig
from megatron.config.section import ConfigError, Section
from megatron.config.source import Source, apply_overrides, canonical, find_file, merge, parse, read_text


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, and what it was made from.

    files: file name -> text, as written; overrides: the `key=value` given on the command line; notices: sentences about keys without effect;
    without_section: the keys as they were written that no section has (other names, keys without effect); places: key (dots for nested ones) ->
    where it was written, such as configs/x.yml:14. A worker process that deepy.py started does not know the places.
    """

    config: NeoXConfig
    files: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    without_section: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict, compare=False)


def load_config(paths: Sequence[Path | str], overrides: Sequence[str] = (), conf_dir: Path | None = None) -> LoadedConfig:
    """The configuration that the files and overrides describe together.

    Files: YAML, NeoX's JSON with comments, or JSON; `.yml` may be left out; relative to `conf_dir` when given. A key may stand in one file only
    (hyphens and underscores are the same); `key=value` overrides win over files. Raises ConfigError with every problem found.
    """
    problems: list[str] = []
    files: dict[str, str] = {}
    paths_by_name: dict[str, Path] = {}
    sources: list[Source] = []
    for path in (find_file(name, conf_dir) for name in paths):
        if path.name in files:
            problems.append(_named_twice(path, paths_by_name[path.name]))
            continue
        paths_by_name[path.name] = path
        text = read_text(path, problems)
        files[path.name] = text or ""
        sources.append(Source(damaged=True) if text is None else parse(text, str(path), problems))
    source = merge(sources, problems)
    resolve_names(source, problems)
    apply_overrides(source, overrides, RENAMED, problems)
    return replace(_build(source, problems), files=files, overrides=tuple(overrides))


def _named_twice(path: Path, first: Path) -> str:
    if path.resolve() == first.resolve():
        return f"{path}: this file is given twice; name it once"
    return f"{path}: another file is also named '{path.name}'; checkpoints save all files in one folder, so rename one of them"


def load_values(values: Mapping[str, Any]) -> LoadedConfig:
    """The configuration of flat keys, as in YAML. Raises ConfigError with every problem found."""
    problems: list[str] = []
    return _build(Source(values={canonical(key): value for key, value in values.items()}), problems)


def config_from_dict(values: Mapping[str, Any]) -> NeoXConfig:
    """The configuration of flat keys, as in YAML. Raises ConfigError with every problem found."""
    return load_values(values).config


def _build(source: Source, problems: list[str]) -> LoadedConfig:
    resolve_names(source, problems)
    add_implied(source)
    notices: list[str] = []
    without_section = written_names(source)
    for key in [key for key in source.values if key not in OWNER]:
        value = without_python_none(source.values[key])
        where = source.place_of((key,))
        prefix = f"{where}: " if where else ""
        verdict = judge(key, value)
        if verdict is None:
            problems.append(f"{prefix}unknown key '{key}'{did_you_mean(key, OWNER)}")
        elif verdict.refused:
            problems.append(prefix + verdict.sentence)
        else:
            without_section[key] = value
            notices.extend([prefix + verdict.sentence] if verdict.sentence else [])
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
    for key, sentence in config.idle_keys():
        where = source.place_of(tuple(key.split(".")))
        notices.append(f"{f'{where}: ' if where else ''}'{key}' {sentence}")
    places = {".".join(path): str(place) for path, place in source.places.items()}
    return LoadedConfig(config, notices=tuple(notices), without_section=without_section, places=places)


def _build_section(name: str, section: type[Section], source: Source, broken: set[str], problems: list[str]) -> Section | None:
    """One section. Keys with a value of the wrong type are reported, added to `broken` and left out, so that rules about others still speak."""
    given = {key: as_declared(value, section.model_fields[key].annotation) for key, value in source.values.items() if OWNER[key] == name}
    given = {key: value for key, value in given.items() if value is not None or not _holds_many(section.model_fields[key].annotation)}
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


def _holds_many(annotation: Any) -> bool:
    """Whether the values are dictionaries or lists: null then means that nothing is given, as in NeoX."""
    return typing.get_origin(annotation) in (dict, list) or (isinstance(annotation, type) and issubclass(annotation, Section))


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
