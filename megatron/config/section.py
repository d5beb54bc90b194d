"""What every group of configuration keys has in common: frozen, strictly typed, no unknown keys, and rules that name their keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one problem a line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([f"{len(problems)} problem(s) in the configuration:", *("  " + problem for problem in problems)]))


class Problem(NamedTuple):
    """A broken rule: the keys it is about (the one to change first; dots for nested ones) and the sentence that says what is allowed."""

    keys: tuple[str, ...]
    message: str


class RuleError(ValueError):
    """Raised by a section whose values have the right types but do not fit together. The loader turns `problems` into lines with file and line."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{problem.keys[0]}: {problem.message}" for problem in problems))


class Section(BaseModel):
    """One named group of keys. Frozen: nothing at run time is ever written back into it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)

    not_built: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Key -> {a value of GPT-NeoX's that is not among the allowed ones, in lower case: why, and what to use instead}."""

    def check(self) -> Iterator[Problem]:
        """The rules that a type cannot express; yields what is broken."""
        yield from ()

    @model_validator(mode="after")
    def _hold_rules(self) -> Section:
        if problems := list(self.check()):
            raise RuleError(problems)
        return self


_LARGEST_SEED = 2**32 - 1  # numpy's limit

Seed = Annotated[int, Field(ge=0, le=_LARGEST_SEED)]
PositiveInt = Annotated[int, Field(ge=1)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
