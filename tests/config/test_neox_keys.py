"""All 318 keys of GPT-NeoX, one by one, from the table neox_keys.tsv: here with NeoX's type and default, or in the table of aliases with a reason.

The table says for each key whether NeoX's configurations use it (core), it can be used (tail), NeoX works it out itself (derived), or nothing in
NeoX reads it (dead).
"""

from __future__ import annotations

import ast
import csv
import re
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron.config.aliases import OTHER_DEFAULTS, RENAMED, TABLE, Ignored, Refused, judge
from megatron.config.loader import load_values
from megatron.config.neox import OWNER, SECTION_CLASSES
from megatron.config.neox_defaults import NEOX_DEFAULTS
from megatron.config.reference import reference_page
from megatron.config.section import ConfigError, Section

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
REQUIRED_BY_NEOX_TOO = set(MODEL) - {"seq_length"}
# NeoX's own slip -> what the key really holds.
OTHER_TYPES = {"communication_data_type": "NeoX says bool, which DeepSpeed has never accepted; the name of a number format is meant"}
# Choices that NeoX knows and that are refused with a sentence.
REFUSED_CHOICES = {
    "norm": {"te_rmsnorm", "te_layernorm"},
    "data_impl": {"cached"},
    "pack_impl": {"unpacked"},
    "dataset_impl": {"pairwise", "online"},
    "train_impl": {"dpo", "rm", "kto", "reinforce"},
    "optimizer_type": {"onebitadam", "cpu_adam", "cpu_torch_adam", "sm3", "madgrad_wd", "sgd", "lion"},
    "zero_stage": {"all"},
}


class Key(NamedTuple):
    """A line of the table; `type` as NeoX writes it."""

    key: str
    type: str
    default: Any
    mark: str


def _keys() -> list[Key]:
    with Path(__file__).with_name("neox_keys.tsv").open() as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    return [Key(row["key"], row["type"], None if row["key"] == "git_hash" else ast.literal_eval(row["default"]), row["mark"]) for row in rows]


KEYS = _keys()
IN_SECTIONS = [key for key in KEYS if key.key in OWNER]


def test_the_table_is_complete() -> None:
    counts = {mark: sum(key.mark == mark for key in KEYS) for mark in ("core", "tail", "derived", "dead")}
    assert counts == {"core": 91, "tail": 184, "derived": 26, "dead": 17}
    assert len({key.key for key in KEYS}) == 318


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.key)
def test_a_key_is_in_a_section_or_has_a_reason(key: Key) -> None:
    places = [key.key in OWNER, key.key in TABLE, key.key in RENAMED]
    assert sum(places) == 1, f"{key.key} has to be in one place: a section, the table of aliases, or the table of other names"
    if entry := TABLE.get(key.key):
        assert len(entry.reason.split()) >= 4, f"{key.key}: '{entry.reason}' does not say why"
        assert f"`{key.key}`" in reference_page()


@pytest.mark.parametrize("key", IN_SECTIONS, ids=lambda key: key.key)
def test_the_default_is_neox_s(key: Key) -> None:
    field = SECTION_CLASSES[OWNER[key.key]].model_fields[key.key]
    if field.is_required():
        assert key.key in REQUIRED_BY_NEOX_TOO or key.key in OTHER_DEFAULTS
        return
    own = field.get_default(call_default_factory=True)
    nothing = own is None or isinstance(own, Section) or own in ({}, [])
    if key.key in OTHER_DEFAULTS:
        assert OTHER_DEFAULTS[key.key][0] == key.default != own
    else:
        assert (nothing and key.default is None) or own == key.default


@pytest.mark.parametrize("key", [key for key in IN_SECTIONS if key.key not in OTHER_TYPES], ids=lambda key: key.key)
def test_the_type_is_neox_s(key: Key) -> None:
    own = _kinds(SECTION_CLASSES[OWNER[key.key]].model_fields[key.key].annotation)
    for kind in _neox_kinds(key.type):
        assert kind in own or (kind == "int" and "float" in own), f"{key.key}: NeoX takes {key.type}, here it is {sorted(own)}"


def _kinds(annotation: Any) -> set[str]:
    """The kinds of values of one of our fields: int, float, str, bool, list, dict."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kinds(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return {kind for argument in arguments if argument is not type(None) for kind in _kinds(argument)}
    if origin is typing.Literal:
        return {type(choice).__name__ for choice in arguments}
    if origin in (list, tuple, dict):
        return {"dict" if origin is dict else "list"}
    return {"dict"} if isinstance(annotation, type) and issubclass(annotation, Section) else {annotation.__name__}


def _neox_kinds(text: str) -> set[str]:
    return {"str" if "Literal" in text else word for word in re.findall(r"\b(?:int|float|str|bool|list|dict|Literal)\b", text)}


@pytest.mark.parametrize("key", [key for key in KEYS if key.key not in MODEL], ids=lambda key: key.key)
def test_neox_s_default_can_be_written_out(key: Key) -> None:
    """A file that spells out every default loads, except where the default itself is among the refused choices."""
    if key.default in REFUSED_CHOICES.get(key.key, ()):
        _accepted_or_refused(key.key, key.default)
    else:
        load_values({**MODEL, key.key: key.default})


CHOICES = [(key.key, choice, choice) for key in KEYS for choice in re.findall(r"'([^']+)'", key.type)]
# NeoX reads choices without regard to case. The names of routers are registered by anyone, so there case counts.
CHOICES += [(key, choice, choice.upper()) for key, choice, _ in CHOICES if key != "moe_router_type"]


@pytest.mark.parametrize(("key", "choice", "written"), CHOICES)
def test_a_choice_of_neox_s_is_taken_or_refused_with_a_sentence(key: str, choice: str, written: str) -> None:
    if not _accepted_or_refused(key, written):
        assert choice in REFUSED_CHOICES[key]


def _accepted_or_refused(key: str, value: Any) -> bool:
    problems = _problems(key, value)
    assert all(problem.lower().startswith(f"'{key}' = '{value}'".lower()) for problem in problems)
    assert len(problems) <= 1
    return not problems


def _problems(key: str, value: Any) -> list[str]:
    try:
        load_values({**MODEL, key: value})
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("key", sorted(key for key, entry in TABLE.items() if isinstance(entry, Refused)))
def test_a_refusal_says_what_to_do(key: str) -> None:
    verdict = judge(key, "unheard-of")
    assert verdict is not None
    assert re.search(r"\b(remove it|write|use|set|keep|give)\b", verdict.sentence), verdict.sentence


def test_the_table_is_upstream_s(shared_dir: Path) -> None:
    with (shared_dir / "reference" / "neox_keys.tsv").open() as table:
        upstream = [[row["key"], row["type"], row["default"], row["mark"]] for row in csv.DictReader(table, delimiter="\t")]
    assert [line.split("\t") for line in Path(__file__).with_name("neox_keys.tsv").read_text().splitlines()[1:]] == upstream


def test_dead_keys_never_stop_a_run() -> None:
    for key in KEYS:
        if key.mark == "dead" and key.key in TABLE:
            assert isinstance(TABLE[key.key], Ignored)


def test_a_key_with_a_section_has_its_default_there_alone() -> None:
    assert not set(NEOX_DEFAULTS) & set(OWNER)
