"""Which files a corpus has: those of local folders, or those of a folder of a repository on the Hugging Face hub, which are downloaded one by one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.corpus.hub import hub_errors
from megatron.data.indexed import DatasetError
from megatron.data.input.input_files import find_files
from megatron.data.optional import import_optional
from megatron.data.parts.record import InputFile


@dataclass(frozen=True)
class Subset:
    """A subset of FineWeb: its folder in the repository, the GPT-2 tokens and bytes of parquet files that its card states, and its documents. None:
    not stated. The card states 388 GB for sample-350BT, which contradicts its tokens; here it has 3.5 times the bytes and documents of sample-100BT.
    """

    folder: str
    gpt2_tokens: float | None = None
    parquet_bytes: float | None = None
    documents: float | None = None


FINEWEB = {
    "sample-10BT": Subset("sample/10BT", 10e9, 27.6e9, 14_868_862),
    "sample-100BT": Subset("sample/100BT", 100e9, 277.4e9, 149e6),
    "sample-350BT": Subset("sample/350BT", 350e9, 970.9e9, 521.5e6),
    "default": Subset("data", 15e12),
}
BY_FILE = {
    "fineweb": ("HuggingFaceFW/fineweb", FINEWEB),
    "fineweb-edu": (
        "HuggingFaceFW/fineweb-edu",
        {
            "sample-10BT": Subset("sample/10BT", 10e9),
            "sample-100BT": Subset("sample/100BT", 100e9),
            "sample-350BT": Subset("sample/350BT", 350e9),
            "default": Subset("data", 1.3e12),
        },
    ),
}
"""Corpora whose files are known: repository and subsets."""
FEWEST_A_GPT2_TOKEN = 0.85
"""Tokens of the most economical usual tokenizer for each GPT-2 token of English web pages: the subset is chosen for the worst case."""


def subset_for(name: str, wanted: int | None, given: str | None) -> str:
    """The subset of a corpus of BY_FILE: the user's, or the smallest one with `wanted` tokens of any usual tokenizer (None: the first)."""
    subsets = BY_FILE[name][1]
    if given is not None:
        return given
    enough = [key for key, subset in subsets.items() if wanted is None or (subset.gpt2_tokens or 0) * FEWEST_A_GPT2_TOKEN >= wanted]
    return enough[0] if enough else list(subsets)[-1]


def folder_of_subset(name: str, subset: str) -> str:
    """A crawl (CC-MAIN-2024-10) is a folder of the whole corpus. Raises DatasetError."""
    subsets = BY_FILE[name][1]
    if subset.startswith("CC-MAIN-"):
        return f"data/{subset}"
    if subset not in subsets:
        raise DatasetError(f"--subset {subset}: {name} has {', '.join(subsets)} and its crawls (such as CC-MAIN-2024-10)")
    return subsets[subset].folder


def local_files(inputs: Sequence[str]) -> list[InputFile]:
    """The user's files in natural order, with names below the folder that they share."""
    paths = [path.resolve() for path in find_files(inputs)]
    pipe = next((path for path in paths if not path.is_file()), None)
    if pipe is not None:
        raise DatasetError(f"{pipe} is no file; --by-file reads files, so that it can go on after an interruption")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return [InputFile(str(path.relative_to(root)), path.stat().st_size, None, path) for path in paths]


def hub_files(repository: str, folder: str, directory: Path) -> tuple[str, list[InputFile]]:
    """(the revision, the files of a folder). `directory`: where downloads lie. Raises DatasetError."""
    hub = hub_package(repository)
    with hub_errors(repository):
        api = hub.HfApi()
        revision: str = api.dataset_info(repository).sha
        tree = list(api.list_repo_tree(repository, folder, recursive=True, revision=revision, repo_type="dataset"))
    files = [entry for entry in tree if hasattr(entry, "size") and entry.path.endswith(".parquet")]
    if not files:
        raise DatasetError(f"{repository}: no .parquet files in {folder}")
    listed = [InputFile(entry.path, entry.size, getattr(entry.lfs, "sha256", None), directory / entry.path) for entry in files]
    return revision, sorted(listed, key=lambda file: file.name)


def download(repository: str, revision: str, file: InputFile, directory: Path) -> InputFile:
    """Downloads a file if it does not lie in `directory` with its size. An interrupted download goes on where it stopped. Raises DatasetError."""
    if file.path.is_file() and file.path.stat().st_size == file.size:
        return file
    hub = hub_package(repository)
    with hub_errors(repository):
        hub.utils.disable_progress_bars()
        hub.hf_hub_download(repository, file.name, repo_type="dataset", revision=revision, local_dir=directory)
    if file.path.stat().st_size != file.size:
        raise DatasetError(f"{file.path} has {file.path.stat().st_size:,} bytes after the download and not {file.size:,}; give the command again")
    return file


def hub_package(repository: str) -> Any:
    return import_optional("huggingface_hub", f"{repository} needs the package huggingface_hub (`pip install huggingface_hub`)")
