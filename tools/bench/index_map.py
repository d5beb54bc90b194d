#!/usr/bin/env python
"""Measure time and memory to compute the order of samples of many documents, with the compiled builders and with NumPy's, each in its own process.

The measured work is that of the first start of a training run: digest of the index, building the maps, writing them. The token file is sparse
(empty).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron.data.builders import load_compiled, reference
from megatron.data.indexed import CODES, HEADER, MAGIC, VERSION, IndexedDataset
from megatron.data.sample import index_map, whole_maps
from megatron.data.sample.map_cache import Packing, load_or_build


def write_index(prefix: Path, documents: int, mean_tokens: int) -> None:
    """An index of documents of 1 to 2 * mean_tokens - 1 tokens, and a hole of the size of their tokens."""
    sizes = np.random.default_rng(0).integers(1, 2 * mean_tokens, documents, dtype=np.int32)
    dtype = np.dtype("<u2")
    ends = np.cumsum(sizes.astype(np.int64) * dtype.itemsize)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], documents, documents + 1))
        for values in (sizes, ends - sizes * dtype.itemsize, np.arange(documents + 1)):
            file.write(values.data)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(int(ends[-1]))


def measure(prefix: Path, name: str, pack_impl: str, seq_length: int) -> dict[str, float | int | str]:
    compiled, reason = load_compiled()
    if name == "compiled" and compiled is None:
        return {"builders": name, "skipped": reason}
    for module in (index_map, whole_maps):
        module.builders = lambda: compiled if name == "compiled" else reference  # type: ignore[attr-defined]
    started, cpu = time.perf_counter(), time.process_time()
    dataset = IndexedDataset(prefix)
    samples = dataset.num_tokens // seq_length - 1
    load_or_build(dataset, range(len(dataset)), seq_length=seq_length, num_samples=samples, seed=1234, packing=Packing(pack_impl))  # type: ignore[arg-type]
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = {"seconds": round(seconds, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    return {"builders": name, "pack_impl": pack_impl, "documents": len(dataset), "samples": samples, **times, "peak_MiB": peak // 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--mean-tokens", type=int, default=1000, help="of a document")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--pack-impl", nargs="+", choices=("packed", "pack_until_overflow"), default=["packed"])
    parser.add_argument("--step", nargs=3, metavar=("PREFIX", "WHAT", "PACKING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step and arguments.step[1] == "write":
        write_index(Path(arguments.step[0]), arguments.documents, arguments.mean_tokens)
    elif arguments.step:
        print(json.dumps(measure(Path(arguments.step[0]), *arguments.step[1:], arguments.seq_length)))
    else:
        for pack_impl in arguments.pack_impl:
            with tempfile.TemporaryDirectory() as folder:
                for what in ("write", "compiled", "numpy"):  # a process inherits the peak of the one that starts it: this one stays small
                    shutil.rmtree(Path(folder) / "index_maps", ignore_errors=True)
                    subprocess.run([sys.executable, *sys.argv, "--step", f"{folder}/text", what, pack_impl], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
