"""Registries: names to classes, imported on first use, with a sentence for a name that is not there."""

from __future__ import annotations

from collections import OrderedDict

import pytest

from megatron.config.components import UnknownComponent, resolve_component


def test_a_string_is_imported_and_a_class_is_itself() -> None:
    registry = {"text": "collections:OrderedDict", "class": OrderedDict}
    assert resolve_component(registry, "text") is OrderedDict
    assert resolve_component(registry, "class") is OrderedDict


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownComponent) as caught:
        resolve_component({"topk": object, "toy": object}, "top-k")
    assert str(caught.value) == "unknown name 'top-k'; did you mean 'topk'?; known: topk, toy"


def test_an_entry_that_leads_nowhere() -> None:
    with pytest.raises(UnknownComponent) as caught:
        resolve_component({"toy": "collections:NoSuchClass"}, "toy")
    assert str(caught.value) == "'toy' is registered as 'collections:NoSuchClass', but collections has no 'NoSuchClass'"
