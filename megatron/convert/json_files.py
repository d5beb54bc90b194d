"""Settings of Hugging Face's: files that hold one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.convert.errors import ConversionError


def read_json(file: Path) -> dict[str, Any]:
    """Settings; empty where there is no such file. Raises ConversionError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ConversionError(f"{file} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} is damaged: it holds a {type(content).__name__}, but must hold a dictionary of settings.")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes settings as people read them."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
