"""The files beside a tokenizer that say how a model uses it: Hugging Face's settings, named tokens, chat templates, ids that end a text."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.config.data import DataConfig

CONFIG, SPECIAL_TOKENS, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERATION = "generation_config.json"
TOKEN_IDS = "token_ids.json"
"""Our own file: the STATED entries of the config.json of an imported model. Our tokenizers have no config.json beside them."""
ROUTER_LOGITS = "output_router_logits"
STATED = ("bos_token_id", "eos_token_id", "pad_token_id", ROUTER_LOGITS)
"""Entries of config.json that go back as they came: whether transformers adds the balance loss is among them."""
TEMPLATES = "additional_chat_templates"
"""A folder of further chat templates."""
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
FILES = (CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, GENERATION, TOKEN_IDS, "chat_template.jinja", "chat_template.json")


def copy_companions(folder: Path, target: Path, *, templates: bool = True) -> None:
    """Copies those of FILES that `folder` has, and with `templates` those of TEMPLATES."""
    if folder.resolve() == target.resolve():
        return
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if templates and (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


def folder_of(data: DataConfig) -> Path | None:
    """The folder of a tokenizer's companions: that of `generation_config` if given, else that of `vocab_file` (or `vocab_file` itself, if it is
    a folder). None: neither is given."""
    if data.generation_config is not None:
        return Path(data.generation_config).parent
    if data.vocab_file is None:
        return None
    given = Path(data.vocab_file)
    return given if given.is_dir() else given.parent


def read_settings(file: Path) -> dict[str, Any]:
    """The settings of a JSON file. Empty if the file is missing or holds no settings."""
    content: Any = None
    with contextlib.suppress(OSError, ValueError):  # a file that is not JSON belongs to something else
        content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def named_token(folder: Path, name: str) -> str | None:
    """The text of `eos_token` or a similar setting, which may be a string or a dictionary. It is read from tokenizer_config.json, else from
    special_tokens_map.json (older versions of transformers). None: neither file names it."""
    for file in (CONFIG, SPECIAL_TOKENS):
        value = token_text(read_settings(folder / file).get(name))
        if value is not None:
            return value
    return None


def token_text(value: Any) -> str | None:
    """The text of a token in a settings file. None: the value is not a token."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def chat_templates(folder: Path) -> str:
    """All chat templates in `folder`, as one text."""
    stored = read_settings(folder / CONFIG).get("chat_template")
    named = stored if isinstance(stored, list) else []
    texts = [stored] if isinstance(stored, str) else [str(item.get("template")) for item in named if isinstance(item, dict)]
    files = [folder / "chat_template.jinja", *sorted((folder / TEMPLATES).glob("*.jinja"))]
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            texts.append(file.read_text(encoding="utf-8"))
    return "\n".join(texts)


def id_list(value: Any) -> list[int]:
    """Token ids of a setting that holds one, a list of them, or nothing."""
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool) and number >= 0]


def stated_ends(folder: Path) -> list[int]:
    """The ids at which the model of `folder` stops: first those of generation_config.json, then those of config.json, which TOKEN_IDS keeps."""
    stated: list[Mapping[str, Any]] = [read_settings(folder / GENERATION), read_settings(folder / TOKEN_IDS)]
    ids = [number for settings in stated for number in id_list(settings.get("eos_token_id"))]
    return list(dict.fromkeys(ids))
