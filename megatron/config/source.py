"""Reading YAML with the place of every key: file, line, and what was given twice."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron.config import disk
from megatron.config.components import did_you_mean

YAML_SUFFIXES = (".yml", ".yaml", ".json")
KeyPath = tuple[str, ...]

_PYTHON_NONE = "!python-none"


class PythonNone(str):
    """`None` without quotes, as Python writes YAML's null; what it means depends on the key (`pos_emb: None` is the choice 'none')."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Composes nodes; a plain `None` gets a tag of its own, a quoted one is text."""


class _Constructor(yaml.SafeLoader):
    """Makes values of nodes."""


_Loader.add_implicit_resolver(_PYTHON_NONE, re.compile("^None$"), ["N"])
_Constructor.add_constructor(_PYTHON_NONE, lambda loader, node: PythonNone(node.value))


@dataclass(frozen=True)
class Place:
    """Where a value was written; `line` is None on the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


COMMAND_LINE = Place("command line")


@dataclass
class Source:
    """Values as written, keys in canonical spelling, with the place of every key at every depth."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    written: dict[KeyPath, str] = field(default_factory=dict)  # how a key was called by whoever wrote it, where that is not its name
    damaged: bool = False  # part of it could not be read, so that a key that seems to be missing may be there

    def place_of(self, path: KeyPath) -> Place | None:
        """The place of the deepest part of `path` that was written, or None when nothing of it was."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return None

    def name_of(self, path: KeyPath) -> str:
        """The name of a key or of a value inside it, as messages show it: `'a.b[0]'` in quotes, by the name under which it was written."""
        length = next((length for length in range(len(path), 0, -1) if path[:length] in self.written), 0)
        first = self.written[path[:length]] if length else path[0]
        inner = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path[length or 1 :])
        return f"'{first}{inner}'"

    def as_written(self, sentence: str) -> str:
        """A sentence with the names under which its keys were written; a name without an underscore, such as bf16, may be a word and stays."""
        for path, name in self.written.items():
            if "_" not in ".".join(path):
                continue
            sentence = re.sub(rf"(?<![\w.]){re.escape('.'.join(path))}\b", name, sentence)
        return sentence

    def drop(self, key: str) -> None:
        """Forgets a key and everything under it."""
        self.values.pop(key, None)
        self.places = {path: place for path, place in self.places.items() if path[0] != key}
        self.written = {path: name for path, name in self.written.items() if path[0] != key}


def canonical(key: str) -> str:
    """NeoX's rule: hyphens and underscores are the same."""
    return key.replace("-", "_")


def find_file(name: Path | str, conf_dir: Path | None) -> Path:
    """The file meant by a name on the command line: inside `conf_dir` when given, `.yml` added when there is no suffix."""
    path = Path(name) if conf_dir is None else Path(conf_dir) / name
    return path if path.suffix.lower() in YAML_SUFFIXES or path.name in ("", "..") else path.with_name(path.name + ".yml")


def read_text(path: Path, problems: list[str]) -> str | None:
    """The text of a configuration file; what keeps it from being read becomes a problem, and the text None."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        names = [entry.name for entry in folder.iterdir() if entry.suffix in YAML_SUFFIXES] if folder.is_dir() else []
        reason = f"no such file{did_you_mean(path.name, names)}" if folder.is_dir() else f"no such file: there is no directory '{folder}'"
    except IsADirectoryError:
        reason = "is a directory, not a file; give the YAML files in it by name"
    except UnicodeDecodeError:
        reason = "is not UTF-8 text; save it as UTF-8"
    except OSError as error:
        reason = f"cannot be read ({disk.reason(error)})"
    problems.append(f"{path}: {reason}")
    return None


def parse(text: str, file: str, problems: list[str]) -> Source:
    """The keys of one file: YAML, NeoX's JSON with comments, or JSON. Everything wrong with it becomes a problem with its line."""
    source = Source()
    try:
        node = yaml.compose(_without_leading_tabs(text), Loader=_Loader)
        if node is None:
            return source
        if not isinstance(node, yaml.MappingNode):
            problems.append(f"{file}:{node.start_mark.line + 1}: must consist of `key: value` lines, but is {_kind(node)}")
            source.damaged = True
            return source
        for key_node, value_node in node.value:
            _take(source, key_node, value_node, file, problems)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problems.append(f"{file}:{mark.line + 1}: not valid YAML: {_readable(error)}" if mark else f"{file}: not valid YAML: {_readable(error)}")
        source.damaged = True
    return source


def _take(source: Source, key_node: yaml.Node, value_node: yaml.Node, file: str, problems: list[str]) -> None:
    place = Place(file, key_node.start_mark.line + 1)
    if not isinstance(key_node, yaml.ScalarNode):
        problems.append(f"{place}: a key must be a word, but is a {'list' if isinstance(key_node, yaml.SequenceNode) else 'dictionary'}")
        return
    written = str(key_node.value)
    key = canonical(written)
    if key in source.values:
        problems.append(f"{place}: '{written}' is given twice (as '{key}'); it was first given at {source.places[(key,)]}")
        return
    source.places[(key,)] = place
    _note_places(source, (key,), value_node, file, problems)
    try:
        source.values[key] = _construct(value_node)
    except ValueError as error:  # YAML sees a date, such as 2024-13-01, or is told to with !!timestamp
        shown = value_node.value if isinstance(value_node, yaml.ScalarNode) else "..."
        problems.append(f"{place}: '{written}' = {shown}: cannot be read ({error}); put text in quotes")


def _construct(node: yaml.Node) -> Any:
    """The value of a node: numbers, text, lists and dictionaries with text as keys. Raises ValueError for anything else that YAML can say."""
    loader = _Constructor("")
    try:
        return _plain(loader.construct_object(node, deep=True))
    except AttributeError as error:  # PyYAML's own slip with a !!timestamp that is none
        raise ValueError("the value does not match its YAML tag") from error
    finally:
        loader.dispose()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else json.dumps(key, default=str): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"a {type(value).__name__} is not a number, text, list or dictionary")


def _note_places(source: Source, path: KeyPath, node: yaml.Node, file: str, problems: list[str]) -> None:
    """Lines of nested keys, and keys given twice in a nested dictionary (YAML itself would keep the last one silently)."""
    if not isinstance(node, yaml.MappingNode) or len(path) > 8:
        return
    for key_node, value_node in node.value:
        inner, place = (*path, str(key_node.value)), Place(file, key_node.start_mark.line + 1)
        if inner in source.places:
            problems.append(f"{place}: '{'.'.join(inner)}' is given twice, first at {source.places[inner]}")
            continue
        source.places[inner] = place
        _note_places(source, inner, value_node, file, problems)


def _without_leading_tabs(text: str) -> str:
    """JSON files may be indented with tabs, which YAML forbids; line numbers stay as they are."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines or not lines[0].lstrip().startswith("{"):
        return text
    return "\n".join(line.replace("\t", " ") if line.startswith((" ", "\t")) else line for line in text.splitlines())


def _kind(node: yaml.Node) -> str:
    return "a sequence" if isinstance(node, yaml.SequenceNode) else f"the single value {node.value!r}"


def _readable(error: Exception) -> str:
    parts = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    return ", ".join(parts) or str(error).splitlines()[0]


def merge(sources: list[Source], problems: list[str]) -> Source:
    """One source of several files. A key in two files is a problem, as in NeoX: neither file silently wins."""
    merged = Source(damaged=any(source.damaged for source in sources))
    for source in sources:
        for key, value in source.values.items():
            if key in merged.values:
                problems.append(f"{source.places[(key,)]}: '{key}' is already given at {merged.places[(key,)]}; a key may stand in one file only")
                continue
            merged.values[key] = value
            merged.places.update({path: place for path, place in source.places.items() if path[0] == key})
    return merged


def apply_overrides(source: Source, overrides: Sequence[str], names: Mapping[str, str], problems: list[str]) -> None:
    """Writes `key=value` (dots for nested dictionaries, values in YAML) over what the files say. `names`: other name -> key, dots for nested ones."""
    seen: set[KeyPath] = set()
    for override in overrides:
        name, equals, text = override.partition("=")
        path = tuple(name.strip().split("."))
        if not equals or not all(path):
            problems.append(f"{COMMAND_LINE}: '{override}' is not an override; write key=value, or key.inner=value for a value inside a dictionary")
            continue
        old = canonical(path[0])
        path = (*names.get(old, old).split("."), *path[1:])
        if path in seen:
            problems.append(f"{COMMAND_LINE}: '{'.'.join(path)}' is given twice")
            continue
        seen.add(path)
        try:
            node = yaml.compose(text, Loader=_Loader)
            value = None if node is None else _construct(node)
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{COMMAND_LINE}: '{override}': the value is not valid YAML: {_readable(error)}")
            continue
        _put(source, path, value, problems)
        if old in names:
            source.written[path] = old


def _put(source: Source, path: KeyPath, value: Any, problems: list[str]) -> None:
    if len(path) == 1:
        source.drop(path[0])
    holder: dict[str, Any] = source.values
    for depth, part in enumerate(path[:-1], start=1):
        inner = holder.get(part)
        if inner is not None and not isinstance(inner, dict):
            problems.append(f"{COMMAND_LINE}: '{'.'.join(path)}': '{'.'.join(path[:depth])}' is not a dictionary but {inner!r}")
            return
        holder[part] = dict(inner or {})
        holder = holder[part]
        source.places.setdefault(path[:depth], COMMAND_LINE)
    holder[path[-1]] = value
    source.places[path] = COMMAND_LINE
    source.written.pop(path, None)
