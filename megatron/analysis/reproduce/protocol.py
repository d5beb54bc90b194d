"""The protocol: arms, texts, tiers and claims, read from one YAML file and checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron.config import config_from_dict
from megatron.config.neox import NeoXConfig
from megatron.config.section import ConfigError
from megatron.config.size import count_parameters, flops_per_token, padded_vocab_size

PROTOCOL = Path("docs/reproduction/protocol.yml")
QUANTITIES = (
    "test_loss",
    "second_half",
    "replacement",
    "log2_replacement",
    "delta_uniform",
    "lore_entropy",
    "repeats",
    "repeats_first_layer",
    "repeats_by_depth",
    "speedup",
)


class ProtocolError(ValueError):
    """The protocol cannot be used. The message names the file, the entry and what is allowed."""


class Entry(BaseModel):
    """A part of the protocol: frozen, strictly typed, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class AsLargeAs(Entry):
    """The arm that this one must be as large as, and how exactly (a part of its size)."""

    arm: str
    count: Literal["total", "active"]
    within: float = Field(ge=0)


class Arm(Entry):
    """A model. Its settings come after those of the base."""

    group: str
    base: str
    title: str
    says: str
    settings: dict[str, Any]
    as_large_as: AsLargeAs | None = None
    """None: other arms are matched to this one."""


class Text(Entry):
    """A text to train on, as `prepare_data.py` knows it."""

    corpus: str
    text: str
    vocabulary: int = Field(ge=257)


class Search(Entry):
    """The runs that find the learning rate of each arm of a group: how long they are, and the rates that are tried first."""

    steps: int = Field(ge=1)
    rates: list[float] = Field(min_length=1)


class Tier(Entry):
    """How long and how often the arms of each group are trained, and on which texts."""

    steps: int = Field(ge=4)
    seeds: list[int] = Field(min_length=1)
    groups: dict[str, list[str]]
    tuning: dict[str, Search]
    """The groups whose rates are searched. Empty: the learning rates of results.json are used."""


class Tuning(Entry):
    """The search for each arm's learning rate: the first rates, then doubled or halved beyond the best one while it is at the edge."""

    domain: str
    seed: int
    lowest: float
    highest: float
    final: float = Field(ge=0, le=1)


class Measure(Entry):
    """How much text each measurement reads, in tokens, and what counts as a difference."""

    test_tokens: int = Field(ge=1)
    validation_tokens: int = Field(ge=1)
    curve_tokens: int = Field(ge=1)
    curve_points: int = Field(ge=2)
    routing_tokens: int = Field(ge=2)
    confidence: float = Field(gt=0, lt=1)
    smallest_loss: float = Field(ge=0)


class Claim(Entry):
    """A sentence of a paper as a number: positive if the paper is right."""

    title: str
    source: str
    hypothesis: str
    falsified: str
    quantity: str = "test_loss"
    unit: str = "nats"
    sum: dict[str, float] = Field(default_factory=dict)
    faster: str | None = None
    """With `slower`, for the quantity `speedup` only."""
    slower: str | None = None
    shown_above: float | None = None
    """None: `smallest_loss`."""
    reversed_below: float | None = None
    """None: minus `smallest_loss`."""

    @property
    def arms(self) -> list[str]:
        return [*self.sum, *(name for name in (self.faster, self.slower) if name is not None)]


class Picture(Entry):
    """Curves side by side."""

    name: str
    title: str
    source: str
    arms: list[str]


class Protocol(Entry):
    """Everything that is decided before the runs."""

    common: dict[str, Any]
    bases: dict[str, dict[str, Any]]
    domains: dict[str, Text]
    tiers: dict[str, Tier]
    tuning: Tuning
    measure: Measure
    arms: dict[str, Arm]
    claims: dict[str, Claim]
    figures: list[Picture]

    def model_settings(self, arm: str) -> dict[str, Any]:
        """The configuration of an arm without data and without length."""
        own = self.arms[arm]
        return {**self.common, **self.bases[own.base], **own.settings}

    @cached_property
    def sizes(self) -> Mapping[str, Size]:
        """Of every arm."""
        return {name: self._size(name) for name in self.arms}

    def _size(self, arm: str) -> Size:
        config: NeoXConfig = config_from_dict({**self.model_settings(arm), "train_iters": 1, "eval_iters": 0})
        words = max(text.vocabulary for text in self.domains.values())
        padded = padded_vocab_size(words, config.model.make_vocab_size_divisible_by)
        count = count_parameters(config.model, config.moe, padded)
        return Size(total=count.total_sum, active=count.active_sum, flops=flops_per_token(config.model, config.moe, padded))

    def problems(self) -> Iterator[str]:
        """What does not fit together, a sentence each."""
        for name, arm in self.arms.items():
            if arm.base not in self.bases:
                yield f"arms.{name}.base: there is no base {arm.base!r}; there is {_names(self.bases)}"
            if arm.as_large_as is not None and arm.as_large_as.arm not in self.arms:
                yield f"arms.{name}.as_large_as: there is no arm {arm.as_large_as.arm!r}; there is {_names(self.arms)}"
        for name, claim in self.claims.items():
            yield from (f"claims.{name}: there is no arm {arm!r}; there is {_names(self.arms)}" for arm in claim.arms if arm not in self.arms)
            if claim.quantity not in QUANTITIES:
                yield f"claims.{name}.quantity: {claim.quantity!r} is not measured; use one of {', '.join(QUANTITIES)}"
            if (claim.quantity == "speedup") != (claim.faster is not None and claim.slower is not None and not claim.sum):
                yield f"claims.{name}: the quantity speedup goes with the keys faster and slower, every other one with the key sum"
        for picture in self.figures:
            yield from (f"figures: {picture.name}: there is no arm {arm!r}" for arm in picture.arms if arm not in self.arms)
        for name, tier in self.tiers.items():
            unknown = [domain for domains in tier.groups.values() for domain in domains if domain not in self.domains]
            if tier.tuning and set(tier.tuning) != set(tier.groups):
                yield f"tiers.{name}.tuning: must name the groups {_names(tier.groups)}, or none; it names {_names(tier.tuning)}"
            yield from (f"tiers.{name}.groups: there is no text {domain!r}; there is {_names(self.domains)}" for domain in unknown)
        if self.tuning.domain not in self.domains:
            yield f"tuning.domain: there is no text {self.tuning.domain!r}; there is {_names(self.domains)}"

    def bad_settings(self) -> Iterator[str]:
        """What the configuration refuses."""
        for name in self.arms:
            try:
                self._size(name)
            except ConfigError as error:
                yield from (f"arms.{name}: {problem}" for problem in error.problems)

    def mismatches(self) -> Iterator[str]:
        """Arms that are not as large as they should be."""
        for name, arm in self.arms.items():
            if (match := arm.as_large_as) is None:
                continue
            own, other = getattr(self.sizes[name], match.count), getattr(self.sizes[match.arm], match.count)
            if abs(own / other - 1) > match.within:
                yield (
                    f"arms.{name}: has {own:,} {match.count} parameters, and {match.arm} has {other:,}: "
                    f"{own / other - 1:+.1%}, more than {match.within:.1%} apart. Change its settings, or as_large_as.within"
                )


class Size(Entry):
    """Parameters in all and of one token; FLOPs of one token in training."""

    total: int
    active: int
    flops: int


def load_protocol(path: Path = PROTOCOL) -> Protocol:
    """Reads and checks a protocol. Raises ProtocolError with every problem, and OSError."""
    try:
        found = Protocol.model_validate(read_entries(path))
    except yaml.YAMLError as error:
        raise ProtocolError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg'][0].lower()}{one['msg'][1:]}" for one in error.errors()]
        raise ProtocolError(_listed(path, problems)) from None
    problems = list(found.problems())
    if problems := problems or list(found.bad_settings()) or list(found.mismatches()):
        raise ProtocolError(_listed(path, problems))
    return found


def read_entries(path: Path) -> Any:
    """What the file says. With `rest_from: FILE` the entries that it does not give are those of FILE beside it. Raises YAMLError and OSError."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict) or "rest_from" not in entries:
        return entries
    own = {key: value for key, value in entries.items() if key != "rest_from"}
    return {**yaml.safe_load((path.parent / str(entries["rest_from"])).read_text(encoding="utf-8")), **own}


def whole_text(path: Path) -> str:
    """The protocol as one file that needs no other."""
    text = path.read_text(encoding="utf-8")
    return yaml.safe_dump(read_entries(path), sort_keys=False) if "rest_from" in yaml.safe_load(text) else text


def _names(entries: Mapping[str, Any]) -> str:
    return ", ".join(entries)


def _listed(path: Path, problems: list[str]) -> str:
    return "\n".join([f"{path}: {len(problems)} problem(s):", *(f"  {problem}" for problem in problems)])
