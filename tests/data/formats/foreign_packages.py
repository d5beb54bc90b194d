"""Writes one small corpus with the real packages of other projects, or reads one with them. It runs in an interpreter that has one of them:

    python foreign_packages.py PACKAGE TEXTS.jsonl TOKENIZER.json FOLDER
    python foreign_packages.py --read PACKAGE FOLDER FOUND.json
    python foreign_packages.py --export FORMAT PREFIX FOLDER

`make_fixtures.sh` beside it installs the packages and writes what is in `fixtures/`. Every document ends with <|endoftext|>.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

EOD = "<|endoftext|>"


def encoded(texts: list[str], tokenizer: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tokenizer))
    return [[*library.encode(text).ids, library.token_to_id(EOD)] for text in texts]


def stand_in(*names: str) -> None:
    """Modules that a package imports for images or downloads, of which there are none here."""
    for name in names:
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__getattr__ = absent
        sys.modules.setdefault(name, module)


def absent(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"recoverable_errors": ()})


def smallest(documents: list[list[int]]) -> Any:
    return np.uint16 if max(map(max, documents)) < 1 << 16 else np.uint32


def datatrove(texts: list[str], tokenizer: Path, folder: Path) -> None:
    """Three ranks; with a loss mask in `loss/`; without an index in `bare/`."""
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    given = {"eos_token": EOD, "shuffle_documents": False}
    documents = [Document(text=text, id=str(number), metadata={"no_loss_ranges": [(0, 5)]}) for number, text in enumerate(texts)]
    third = len(texts) // 3
    for rank, part in enumerate((documents[:third], documents[third : 2 * third], documents[2 * third :])):
        DocumentTokenizer(str(folder / "plain"), str(tokenizer), **given).run(iter(part), rank=rank, world_size=3)
    DocumentTokenizer(str(folder / "loss"), str(tokenizer), save_loss_metadata=True, **given).run(iter(documents))
    DocumentTokenizer(str(folder / "bare"), str(tokenizer), save_index=False, save_final_metadata=False, **given).run(iter(documents))


def olmo(texts: list[str], tokenizer: Path, folder: Path) -> None:
    stand_in("cached_path", "cached_path.schemes")
    from olmo_core.data.utils import write_document_indices

    documents = encoded(texts, tokenizer)
    dtype, half = smallest(documents), len(documents) // 2
    folder.mkdir(parents=True)
    for number, part in enumerate((documents[:half], documents[half:])):
        path = folder / f"part-{number}-00000.npy"
        tokens = np.memmap(path, dtype, "w+", shape=(sum(map(len, part)),))
        tokens[:] = np.concatenate(part)
        tokens.flush()
        write_document_indices(path, dtype=dtype, eos_token_id=documents[0][-1])


def streaming(texts: list[str], tokenizer: Path, folder: Path) -> None:
    """Tokens as arrays of a fixed type, as arrays that say their type, as llm-foundry's bytes, and beside another column; some compressed."""
    stand_in("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    from streaming import MDSWriter

    documents = encoded(texts, tokenizer)
    kinds = {
        "typed": (f"ndarray:{smallest(documents).__name__}", "zstd:3", lambda row: np.array(row, smallest(documents))),
        "untyped": ("ndarray", None, lambda row: np.array(row, np.int32)),
        "bytes": ("bytes", "gz", lambda row: np.array(row, np.int64).tobytes()),
    }
    for name, (encoding, compression, value) in kinds.items():
        columns = {"tokens": encoding, **({"id": "int", "a": "str"} if name == "untyped" else {})}
        given = {"columns": columns, "compression": compression, "hashes": ["sha1", "xxh64"], "size_limit": 2048}
        with MDSWriter(out=str(folder / name), **given) as writer:
            for number, row in enumerate(documents):
                writer.write({"tokens": value(row), **({"id": number, "a": "x" * number} if name == "untyped" else {})})


def litdata(texts: list[str], tokenizer: Path, folder: Path) -> None:
    """Items that are tensors, arrays, and dictionaries; in compressed chunks too."""
    import torch
    from litdata.streaming.item_loader import PyTreeLoader, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    documents = encoded(texts, tokenizer)
    kinds = {
        "tensors": (TokensLoader, {}, lambda row: torch.tensor(row, dtype=torch.int32)),
        "arrays": (TokensLoader, {"compression": "zstd", "compression_level": "chunk"}, lambda row: np.array(row, smallest(documents))),
        "dictionaries": (PyTreeLoader, {}, lambda row: {"length": len(row), "tokens": torch.tensor(row, dtype=torch.int64)}),
        "framed": (PyTreeLoader, {"compression": "zstd"}, lambda row: torch.tensor(row, dtype=torch.int64)),
    }
    for name, (loader, given, value) in kinds.items():
        writer = BinaryWriter(str(folder / name), chunk_bytes=2048, item_loader=loader(), **given)
        for number, row in enumerate(documents):
            writer.add_item(number, value(row))
        writer.done()
        writer.merge()


def megatron_core(texts: list[str], tokenizer: Path, folder: Path) -> None:
    """A sequence for each document; in `sentences` each document in two sequences, and one without any; in `modes` with a mode for each sequence."""
    import torch

    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    documents = encoded(texts, tokenizer)
    dtype = DType.optimal_dtype(max(map(max, documents)) + 1)
    folder.mkdir(parents=True)
    for name in ("plain", "sentences", "modes", "images"):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype, multimodal=name in ("modes", "images"))
        for number, row in enumerate(documents):
            parts = [row[:3], row[3:]] if name == "sentences" else [row]
            for part in parts:
                builder.add_item(torch.tensor(part), mode=int(name == "images" and number == 2))
            builder.end_document()
        if name == "sentences":
            builder.end_document()
        builder.finalize(str(folder / f"{name}.idx"))


def read_datatrove(folder: Path) -> list[list[int]]:
    """One window, and where its index says that documents begin."""
    from datatrove.utils.dataset import DatatroveFileDataset

    (path,) = folder.glob("*.ds")
    size = int(path.with_suffix(".ds.metadata").read_text().split("|")[1].split()[0])
    row = DatatroveFileDataset(str(path), seq_len=path.stat().st_size // size - 1, token_size=size, return_positions=True)[0]
    tokens, begins = row["input_ids"].tolist(), row["positions"].eq(0).nonzero().flatten().tolist()
    return [tokens[start:end] for start, end in zip(begins, [*begins[1:], len(tokens)], strict=True)]


def read_olmo(folder: Path) -> list[list[int]]:
    stand_in("cached_path", "cached_path.schemes")
    sys.modules["cached_path"].cached_path = lambda path, **_: Path(path)  # type: ignore[attr-defined]
    from olmo_core.data.utils import iter_document_indices, load_array_slice

    (path,) = folder.glob("*.npy")
    dtype = np.uint16 if path.stat().st_size == 2 * max(end for _, end in iter_document_indices(path)) else np.uint32
    return [load_array_slice(path, start, end, dtype).tolist() for start, end in iter_document_indices(path)]


def read_streaming(folder: Path) -> list[list[int]]:
    stand_in("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    from streaming import StreamingDataset

    return [row["tokens"].tolist() for row in StreamingDataset(local=str(folder), shuffle=False, batch_size=1)]


def read_litdata(folder: Path) -> list[list[int]]:
    """One token at a time: its reader of tokens knows no documents."""
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    rows = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=1), shuffle=False)
    return [[int(rows[number][0]) for number in range(len(rows))]]


def read_megatron_core(folder: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (path,) = folder.glob("*.idx")
    return [row.tolist() for row in IndexedDataset(str(path.with_suffix("")))]


def export(kind: str, prefix: str, folder: str) -> None:
    """Our own export, which uses the package for some formats."""
    stand_in("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from megatron.data.formats.exporting import export_tokens
    from megatron.data.progress import build_reporter

    export_tokens(kind, prefix, Path(folder), build_reporter(quiet=True))


PACKAGES = {"datatrove": datatrove, "olmo_core": olmo, "streaming": streaming, "litdata": litdata, "megatron_core": megatron_core}

READERS = {
    "datatrove": read_datatrove,
    "olmo_core": read_olmo,
    "streaming": read_streaming,
    "litdata": read_litdata,
    "megatron_core": read_megatron_core,
}

if __name__ == "__main__":
    if sys.argv[1] == "--export":
        export(*sys.argv[2:])
        sys.exit()
    if sys.argv[1] == "--read":
        Path(sys.argv[4]).write_text(json.dumps(READERS[sys.argv[2]](Path(sys.argv[3]))), encoding="utf-8")
        sys.exit()
    package, texts, tokenizer, folder = sys.argv[1:]
    lines = Path(texts).read_text(encoding="utf-8").splitlines()
    PACKAGES[package]([json.loads(line)["text"] for line in lines], Path(tokenizer), Path(folder) / package)
