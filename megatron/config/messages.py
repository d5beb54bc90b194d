"""Validation errors -> sentences: where, which key, what was given, what is allowed."""

from __future__ import annotations

import typing
from collections.abc import Container, Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron.config.components import did_you_mean
from megatron.config.section import Problem, RuleError, Section
from megatron.config.source import KeyPath, Place, Source

_EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a dictionary",
    "model_type": "must be a dictionary",
    "model_attributes_type": "must be a dictionary",
    "finite_number": "must be a finite number",
}
_LONGEST_VALUE = 80


def describe_types(error: ValidationError, section: type[Section], source: Source) -> Iterator[str]:
    """One line for each value of the wrong type, unknown inner key and missing key of a section."""
    for details in error.errors(include_url=False):
        if not isinstance(details.get("ctx", {}).get("error"), RuleError) and not (details["type"] == "missing" and source.damaged):
            yield _describe_type(details, section, source)


def describe_rules(error: ValidationError, source: Source, defaults: dict[str, Any], *, without: Container[str] = ()) -> Iterator[str]:
    """One line for each broken rule, except those about a key in `without` (its value is wrong already)."""
    for details in error.errors(include_url=False):
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, RuleError):
            yield from (
                _describe_rule(problem, source, defaults)
                for problem in cause.problems
                if not any(key.split(".")[0] in without for key in problem.keys)
            )


def _describe_rule(problem: Problem, source: Source, defaults: dict[str, Any]) -> str:
    """`configs/x.yml:14: 'moe_top_k' = 9: must be at most moe_num_experts (8)`, with the places of further keys that stand in other files."""
    paths = [tuple(key.split(".")) for key in problem.keys]
    given = [(path, place) for path in paths if (place := source.place_of(path[:1])) is not None]
    home = source.place_of(paths[0]) if source.place_of(paths[0][:1]) else (given[0][1] if given else None)
    elsewhere = [
        f"{source.name_of(path)[1:-1]} is given {'on the' if place.line is None else 'at'} {place}"
        for path in paths[1:]
        if (place := source.place_of(path)) is not None and home is not None and place.file != home.file
    ]
    value = _look_up(source.values, paths[0])
    shown = f"{show(value)}" if value is not _MISSING else f"{show(_look_up(defaults, paths[0]))} (default)"
    return line(source, paths[0], shown, "; ".join([source.as_written(problem.message), *elsewhere]), home)


def _describe_type(details: ErrorDetails, section: type[Section], source: Source) -> str:
    path = tuple(str(part) for part in details["loc"])
    kind, context = details["type"], details.get("ctx", {})
    if kind == "too_long" or (kind == "missing" and path[-1].isdigit()):
        outer = path if kind == "too_long" else path[:-1]
        count = len(typing.get_args(_owner(outer, section).model_fields[outer[-1]].annotation))
        return line(source, outer, show(list(_look_up(source.values, outer))), f"must have {count} entries")
    if kind == "missing":
        where = source.place_of(path)
        need = f"'{'.'.join(path)}' must be given: {_first_sentence(section, path)}"
        return f"{where}: {need}" if where else need
    if kind == "extra_forbidden":
        return _unknown_inner_key(path, section, source)
    not_built = getattr(_owner(path, section), "not_built", {})  # inside a list the owner is no section
    reason = not_built.get(path[-1], {}).get(str(details["input"]).lower()) if kind == "literal_error" else None
    return line(source, path, show(details["input"]), f"is not supported: {reason}" if reason else _sentence(kind, context, details))


def _sentence(kind: str, context: dict[str, Any], details: ErrorDetails) -> str:
    value = details["input"]
    if kind in _EXPECTED:
        return _EXPECTED[kind] + _hint(kind, value, str(details["loc"][-1]))
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("more than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
    if kind in bounds:
        words, name = bounds[kind]
        return f"must be {words} {context[name]:g}"
    if kind == "literal_error":
        choices = str(context["expected"])
        return f"must be {choices}{did_you_mean(str(value), [choice.strip(chr(39)) for choice in choices.replace(' or ', ', ').split(', ')])}"
    return details["msg"][:1].lower() + details["msg"][1:]


def _hint(kind: str, value: Any, key: str) -> str:
    if isinstance(value, str) and value.lower() == "none":
        return f"; YAML reads {value} as text: write null, or leave the key out"
    if kind.startswith("int") and isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            return ""
        return f"; write {int(number)}" if number.is_integer() else ""
    if kind == "bool_type" and isinstance(value, str | int):
        return " (without quotes)" if str(value).lower() in ("true", "false") else ""
    if kind == "string_type" and isinstance(value, bool | int | float):
        return ": put it in quotes"
    if kind == "string_type" and isinstance(value, list) and value and all(isinstance(part, str | int | float) for part in value):
        joined = ", ".join(map(str, value))
        return f"; for several corpora write train_data_paths: [{joined}]" if key == "data_path" else f": write '{joined}'"
    if kind == "list_type" and isinstance(value, str) and value:
        return f"; write [{', '.join(part.strip() for part in value.split(',') if part.strip())}]"
    return ""


def _unknown_inner_key(path: KeyPath, section: type[Section], source: Source) -> str:
    allowed = list(_owner(path, section).model_fields)
    where = source.place_of(path)
    text = f"unknown key '{path[-1]}' in '{'.'.join(path[:-1])}'{did_you_mean(path[-1], allowed)}; allowed: {', '.join(allowed)}"
    return f"{where}: {text}" if where else text


def _owner(path: KeyPath, section: type[Section]) -> Any:
    """The (possibly nested) section that has the last key of `path`; no section where the path leads into a list or a dictionary of values."""
    owner: Any = section
    for part in path[:-1]:
        if part not in getattr(owner, "model_fields", {}):
            return owner
        owner = _section_of(owner.model_fields[part].annotation)
    return owner


def _section_of(annotation: Any) -> Any:
    members = getattr(annotation, "__args__", ())
    return next((member for member in members if isinstance(member, type) and issubclass(member, Section)), annotation)


def _first_sentence(section: type[Section], path: KeyPath) -> str:
    description = (section.model_fields[path[0]].description if path[0] in section.model_fields else "") or ""
    return description.split(".")[0].split(";")[0].strip()


def line(source: Source, path: KeyPath, shown: str, message: str, place: Place | None = None) -> str:
    """`configs/x.yml:14: 'moe_top_k' = 9: message`; `place` None: where the value stands."""
    place = place or source.place_of(path)
    text = f"{source.name_of(path)} = {shown}: {message}"
    return f"{place}: {text}" if place else text


_MISSING = object()


def _look_up(values: Any, path: KeyPath) -> Any:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return _MISSING
        values = values[part]
    return values


def show(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    if value is None or value is _MISSING:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
