"""YAML files and command-line overrides -> NeoXConfig."""

from __future__ import annotations

from typing import Any

from megatron.config.neox import OWNER, SECTION_CLASSES, NeoXConfig


def config_from_dict(values: dict[str, Any]) -> NeoXConfig:
    """The configuration of flat keys, as in YAML. Raises ValueError."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        sections.setdefault(OWNER[key], {})[key] = value
    return NeoXConfig(**{name: SECTION_CLASSES[name](**given) for name, given in sections.items()})  # type: ignore[arg-type]
