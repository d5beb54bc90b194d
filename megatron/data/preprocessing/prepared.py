"""A prepared folder: its manifest, its differences from what the user asks for, and its description."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.corpus.hold_out import NOTHING, RECENT
from megatron.data.indexed import DatasetError
from megatron.data.split import SPLITS

MANIFEST = "prepared.json"


@dataclass(frozen=True)
class Prepared:
    """`left_out`: lines about input that could not be read. Empty if everything was read."""

    folder: Path
    up_to_date: bool
    manifest: dict[str, Any]
    left_out: tuple[str, ...] = ()


def read_manifest(target: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder. None: the folder was not made here, or its preparation did not finish."""
    try:
        manifest = json.loads((target / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise DatasetError(f"{target / MANIFEST} is damaged; move {target} away, then prepare it again") from None
    return dict(manifest)


def whole(target: Path, manifest: dict[str, Any]) -> bool:
    return all((target / name).is_file() and (target / name).stat().st_size == size for name, size in manifest["files"].items())


def difference(target: Path, known: dict[str, Any], settings: dict[str, Any]) -> str:
    changed = [key for key, value in settings.items() if known["settings"].get(key) != value]
    if not changed:
        return "is damaged (a file is missing or has another size than when it was written)"
    shown = (
        f"{key} was {known['settings'].get(key)!r}, now {settings[key]!r}" if key not in ("input", "tokenizer_file", "merge_file") else f"other {key}"
        for key in changed
    )
    return f"was prepared differently ({'; '.join(shown)})"


def describe(prepared: Prepared) -> str:
    """The content of the folder, and the config keys that read it."""
    manifest, folder = prepared.manifest, prepared.folder
    lines = [f"{folder} is up to date" if prepared.up_to_date else f"{folder} written", ""]
    lines.append(f"{'split':8}{'documents':>12}{'bytes':>16}{'tokens':>14}{'bytes/token':>13}")
    for split, total in manifest["splits"].items():
        lines.append(f"{split:8}{total['documents']:12,}{total['bytes']:16,}{total['tokens']:14,}{total['bytes'] / total['tokens']:13.3f}")
    lines += ["", f"vocabulary: {manifest['vocab_size']:,}. Config keys:", ""]
    paths = {split: json.dumps(str(folder / prefix)) for split, prefix in manifest["prefixes"].items()}
    recent = paths.pop(RECENT, None)
    if len(paths) == len(SPLITS):
        lines += [f"  {split}_data_paths: [{path}]" for split, path in paths.items()]
    elif manifest["settings"]["hold_out"] == [type(NOTHING).__name__, vars(NOTHING)]:
        lines += [f"  data_path: {paths['train']}", "  (nothing is held out: `split` divides it, 969,30,1 into train, valid and test by default)"]
    else:  # too little text for every split to get some
        lines += [f"  data_path: {paths['train']}", "  split: '1'"]
    lines.append(f"  tokenizer_type: {manifest['tokenizer_type']}")
    for key, name in manifest["tokenizer_files"].items():
        lines.append(f"  {key}: {json.dumps(str(folder / name) if name in manifest['files'] else name)}")
    if recent is not None:
        lines.append(f"  (the newest training documents again, to blend in by train_data_weights: {recent})")
    if prepared.left_out:
        lines += ["", *prepared.left_out]
    return "\n".join(lines)
