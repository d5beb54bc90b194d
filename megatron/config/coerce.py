"""The few conversions from YAML's types to a field's: `1e-3` to a float, a list to a tuple, `adam` to `Adam`, Python's None to null. Nothing else."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

from megatron.config.section import Section
from megatron.config.source import PythonNone

# YAML 1.1 reads a number with an exponent but without a point as text.
_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")


def as_declared(value: Any, annotation: Any) -> Any:
    """`value` in the form that a field of this annotation takes; unchanged when no conversion is foreseen."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if isinstance(value, PythonNone):
        return next((choice for choice in _choices(annotation) if str(choice).lower() == "none"), None)
    if annotation is Any:
        return without_python_none(value)
    if origin is typing.Annotated:
        return as_declared(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _as_first_that_changes(value, arguments)
    if annotation is float:
        return as_number(value)
    if origin is typing.Literal:
        return _as_choice(value, arguments)
    if isinstance(value, dict):
        return _as_declared_dict(value, annotation, arguments)
    if isinstance(value, list | tuple) and origin in (list, tuple):
        members = arguments[:1] * len(value) if origin is list else (*arguments, *[Any] * len(value))
        converted = [as_declared(item, member) for item, member in zip(value, members, strict=False)]
        return converted if origin is list else tuple(converted)
    return value


def as_number(value: Any) -> Any:
    """Text such as `1e-3` as a float, other values unchanged."""
    return float(value.replace("_", "")) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def without_python_none(value: Any) -> Any:
    """`value` with null for every `None`, at every depth."""
    if isinstance(value, dict):
        return {key: without_python_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_python_none(item) for item in value]
    return None if isinstance(value, PythonNone) else value


def _choices(annotation: Any) -> tuple[Any, ...]:
    """What a Literal allows, also inside a union."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return arguments
    return tuple(choice for argument in arguments for choice in _choices(argument))


def _as_first_that_changes(value: Any, arguments: tuple[Any, ...]) -> Any:
    for argument in arguments:
        converted = as_declared(value, argument)
        if converted is not value:
            return converted
    return value


def _as_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, str) and value not in choices:
        return next((choice for choice in choices if isinstance(choice, str) and choice.lower() == value.lower()), value)
    return value


def _as_declared_dict(value: dict[Any, Any], annotation: Any, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        fields = annotation.model_fields
        # Keys that are passed through have no declared type; a number with an exponent is meant as a number there too.
        return {
            key: as_declared(item, fields[key].annotation) if key in fields else as_number(without_python_none(item)) for key, item in value.items()
        }
    return {key: as_declared(item, arguments[1]) for key, item in value.items()} if len(arguments) == 2 else without_python_none(value)
