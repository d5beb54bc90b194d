"""A tokenizer's files beside the data that it made."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron.data.tokenizer.companions import copy_companions

KEPT_NAMES = {
    "HFTokenizer": {"vocab_file": "tokenizer.json"},
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
    "SPMTokenizer": {"vocab_file": "tokenizer.model"},
    "TiktokenTokenizer": {"vocab_file": "tokenizer.model"},
}


def keep_tokenizer(tokenizer_type: str, given: dict[str, str | None], folder: Path) -> dict[str, str]:
    """Copies the files of the config keys `given` into `folder`, and the settings and chat template beside the vocabulary. Returns the keys with
    the names of the copies. A value that is not a file (a folder, a name on a hub) stays as it is. A key without a value is left out."""
    kept = {}
    for key, value in given.items():
        if value is None:
            continue
        kept[key] = value
        name = KEPT_NAMES.get(tokenizer_type, {}).get(key)
        if name is not None and Path(value).is_file():
            shutil.copyfile(value, folder / name)
            kept[key] = name
            if key == "vocab_file":
                copy_companions(Path(value).parent, folder, templates=False)
    return kept
