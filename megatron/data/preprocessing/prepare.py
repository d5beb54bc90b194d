"""Makes the folder that training reads from a corpus: vocabulary, `.bin/.idx` of each split, held-out text, and a manifest of how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron.config.machine import usable_cores
from megatron.data.corpus.corpora import TEST_FRACTION, VALID_FRACTION, Corpus, Request, find_corpus
from megatron.data.corpus.hold_out import NOTHING, RECENT, Fraction, Parts, Survey
from megatron.data.corpus.limits import Limiter, Limits
from megatron.data.indexed import DatasetError, IndexedDatasetWriter, token_dtype
from megatron.data.input.bad_input import BadInput, OnError, ignore
from megatron.data.input.contents import Format
from megatron.data.locking import naming
from megatron.data.preprocessing.bpe import train_bpe
from megatron.data.preprocessing.encode import TextTask, batches
from megatron.data.preprocessing.prepared import MANIFEST, Prepared, difference, read_manifest, whole
from megatron.data.preprocessing.workers import map_in_order
from megatron.data.progress import Reporter
from megatron.data.split import SPLITS
from megatron.data.staging import LOCK, check_replaceable, followed, publish, staging_folder
from megatron.data.tokenizer import Tokenizer
from megatron.data.tokenizer.keep import keep_tokenizer
from megatron.data.tokenizer.lost import Losses

FORMAT = 4  # raise it when the same input and settings give other files
INDEX_MAPS = "index_maps"
TRAINED = "tokenizer.json"
BYTES_A_WORKER = 4_000_000
MOST_TRAINING_BYTES = 1 << 30  # of text for a vocabulary: words that come up later are rare, and all are counted in memory
WHOLE = 1_000_000  # what a progress bar counts to where bytes are not what is measured


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """The command line's options; see `prepare_data.py --help`. `workers` 0: chosen by the amount of text. `by_file` None: chosen by the corpus and
    the limit. `part`: (number, of how many machines); None: this machine does everything."""

    inputs: tuple[str, ...] = ()
    directory: str = "data"
    name: str | None = None
    vocab_size: int = 8192
    tokenizer_type: str = "HFTokenizer"
    tokenizer_file: str | None = None
    merge_file: str | None = None
    jsonl_key: str = "text"
    append_eod: bool = True
    workers: int = 0
    valid_fraction: float | None = None
    test_fraction: float | None = None
    subset: str | None = None
    max_documents: int | str | None = None
    max_bytes: int | str | None = None
    max_tokens: int | str | None = None
    on_error: OnError = "fail"
    input_format: Format = "auto"
    force: bool = False
    force_redownload: bool = False
    by_file: bool | None = None
    part: tuple[int, int] | None = None
    keep_parts: bool = False
    verify: bool = False
    plan: bool = False
    json: bool = False
    sample: tuple[str, ...] = ()

    @property
    def limits(self) -> Limits:
        return Limits(self.max_documents, self.max_bytes, self.max_tokens)


@dataclass
class Totals:
    """Of one split."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0


def prepare(options: PrepareOptions, reporter: Reporter) -> Prepared:
    """Makes `directory/name` completely or not at all. Does nothing if the folder exists and was made from the same input and settings.

    Raises DatasetError or TokenizerError with a sentence for the user.
    """
    corpus = choose_corpus(options)
    target = Path(options.directory) / (corpus.name if options.name is None else options.name)
    if target.name in ("", "..") or options.name not in (None, target.name):
        raise DatasetError(f"--name {options.name!r}: give the name of one folder, without a path; -d is the directory of that folder")
    if options.workers < 0:
        raise DatasetError(f"--workers {options.workers}: give 1 or more, or 0 to choose by the amount of text")
    settings = settings_of(options, corpus)
    known = read_manifest(target)
    anew = options.force or options.force_redownload
    if known is not None and known["settings"] == settings and not anew and whole(target, known):
        return Prepared(target, True, known)
    if known is not None and not anew:
        raise DatasetError(f"{target} {difference(target, known, settings)}; --force replaces it, and another --name keeps both")
    target = followed(target)
    check_replaceable(target, {MANIFEST, INDEX_MAPS, LOCK, *(known["files"] if known else ())})
    with naming(target.parent), staging_folder(target) as stage:
        facts, left_out = Preparation(options, corpus, reporter, stage).run(target.name)
        manifest = {"format": FORMAT, "settings": settings, **facts}
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=1))
        publish(stage, target)
    return Prepared(target, False, manifest, tuple(left_out))


def choose_corpus(options: PrepareOptions) -> Corpus:
    corpus = find_corpus(
        Request(
            inputs=options.inputs,
            jsonl_key=options.jsonl_key,
            directory=options.directory,
            subset=options.subset,
            limits=options.limits,
            refetch=options.force_redownload,
            form=options.input_format,
        )
    )
    if options.valid_fraction is None and options.test_fraction is None:
        return corpus
    valid = VALID_FRACTION if options.valid_fraction is None else options.valid_fraction
    test = TEST_FRACTION if options.test_fraction is None else options.test_fraction
    return replace(corpus, hold_out=Fraction(valid, test))


def settings_of(options: PrepareOptions, corpus: Corpus) -> dict[str, Any]:
    """Everything that the files depend on, as JSON values."""
    settings = {
        "format": FORMAT,
        "input": corpus.identity,
        "limits": options.limits.numbers(),
        "hold_out": [type(corpus.hold_out).__name__, vars(corpus.hold_out)],
        "tokenizer_type": options.tokenizer_type,
        "tokenizer_file": identity_of(options.tokenizer_file),
        "merge_file": identity_of(options.merge_file),
        "vocab_size": options.vocab_size if options.tokenizer_type == "HFTokenizer" and options.tokenizer_file is None else None,
        "append_eod": options.append_eod,
        "on_error": options.on_error,
    }
    return dict(json.loads(json.dumps(settings)))


def identity_of(path: str | None) -> list[int] | str | None:
    """A value that changes when the file's content changes. A text that is not a file's path is its own value."""
    if path is None or not Path(path).is_file():
        return path
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns]


class Preparation:
    """One run: survey the corpus, get a tokenizer, tokenise. Writes into `stage` only."""

    def __init__(self, options: PrepareOptions, corpus: Corpus, reporter: Reporter, stage: Path) -> None:
        self.options = options
        self.corpus = corpus
        self.reporter = reporter
        self.stage = stage
        self.bad_input = BadInput(options.on_error)
        self.losses = Losses(options.on_error)
        self.tokenizer_files: dict[str, str] = {}
        self.count = 0

    def run(self, name: str) -> tuple[dict[str, Any], list[str]]:
        """(the manifest's facts, the lines about input that was left out). `name`: GPT-NeoX's name of the pair if nothing is held out."""
        given = self.given_tokenizer()  # what is wrong with it is said before hours of reading
        self.corpus.begin(self.reporter)
        survey = self.survey(given)
        self.count = len(survey.sizes)
        parts = self.corpus.hold_out.divide(survey)
        tokenizer = self.trained_tokenizer(parts, sum(survey.sizes)) if given is None else given
        prefixes = {split: f"{name if self.corpus.hold_out == NOTHING else split}_text_document" for split in (*SPLITS, RECENT)}
        totals = self.tokenise(parts, token_dtype(tokenizer.vocab_size), sum(survey.sizes), prefixes)
        files = {path.name: path.stat().st_size for path in sorted(self.stage.iterdir()) if path.name != LOCK}
        splits = {split: asdict(totals[split]) for split in prefixes if split in totals}
        used = {"tokenizer_type": self.options.tokenizer_type, "tokenizer_files": self.tokenizer_files, "vocab_size": tokenizer.vocab_size}
        facts = {**used, "splits": splits, "prefixes": {split: prefixes[split] for split in splits}, "files": files}
        return {**facts, "left_out": dict(self.bad_input.counts)}, [*self.losses.summary(), *self.bad_input.summary()]

    def survey(self, tokenizer: Tokenizer | None) -> Survey:
        """Reads the wanted part of the corpus once, and downloads missing parts. `tokenizer` None: there is no tokenizer yet that counts tokens."""
        counter = partial(count_tokens, tokenizer, int(self.options.append_eod)) if tokenizer is not None else None
        survey, meter, limiter = Survey(), self.corpus.meter(), Limiter(self.options.limits, counter)
        total = WHOLE if meter.total or limiter.limits else None
        with self.reporter.stage("reading", total) as stage, closing(limiter.take(self.corpus.documents(self.bad_input, meter))) as documents:
            for document in documents:
                share = max(limiter.fraction, min(meter.done / meter.total, 1.0) if meter.total else 0.0)
                stage.advance(survey.note(document.text), position=round(share * WHOLE))
        if not survey.sizes:
            raise DatasetError("\n".join(["no text in the input", *self.bad_input.summary()]))
        return survey

    def pieces(self, parts: Parts) -> Iterator[tuple[str, str]]:
        """(split, text) of the documents that the survey counted. Problems are not reported a second time."""
        with closing(self.corpus.documents(ignore)) as documents:
            for number, document in zip(range(self.count), documents):  # noqa: B905  # the corpus goes on where a limit ended the survey
                yield from parts.pieces(number, document.text)

    def given_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the options name; its files are copied into the folder. None: a tokenizer must be trained."""
        options = self.options
        if options.tokenizer_type == "HFTokenizer" and options.tokenizer_file is None:
            return None
        tokenizer = self.task().load()
        given = {"vocab_file": options.tokenizer_file, "merge_file": options.merge_file}
        self.tokenizer_files = keep_tokenizer(options.tokenizer_type, given, self.stage)
        return tokenizer

    def task(self) -> TextTask:
        """The encoding task, with the given tokenizer or with the one that `trained_tokenizer` makes."""
        options = self.options
        trained = options.tokenizer_type == "HFTokenizer" and options.tokenizer_file is None
        vocab_file = str(self.stage / TRAINED) if trained else options.tokenizer_file
        return TextTask(options.tokenizer_type, vocab_file, options.merge_file, options.append_eod)

    def trained_tokenizer(self, parts: Parts, total: int) -> Tokenizer:
        """A byte-level BPE of the training part."""
        self.tokenizer_files = {"vocab_file": TRAINED}
        with self.reporter.stage("counting words", total) as stage:

            def training_text() -> Iterator[str]:
                sparse = -(-total // MOST_TRAINING_BYTES)  # of a huge corpus, every so manieth document
                for number, (split, text) in enumerate(self.pieces(parts)):
                    if split != RECENT:
                        stage.advance(len(text.encode()))
                    if split == "train" and number % sparse == 0:
                        yield text
                stage.rest(f"merging into {self.options.vocab_size:,} tokens")

            train_bpe(training_text(), self.options.vocab_size, self.stage / TRAINED)
        return self.task().load()

    def tokenise(self, parts: Parts, dtype: np.dtype[Any], total: int, prefixes: dict[str, str]) -> dict[str, Totals]:
        """Encodes and writes all texts. A text without tokens is left out."""
        outputs: dict[str, SplitOutput] = {}
        done = 0
        batched = (([(text,) for _, text in batch], batch) for batch in batches(self.pieces(parts), lambda piece: len(piece[1])))
        encoding = map_in_order(self.task(), batched, self.options.workers or default_workers(total))
        with closing(encoding), ExitStack() as files, self.reporter.stage("tokenising", total) as stage:
            for encoded, batch in encoding:
                (column,) = encoded.columns
                for row, lost in encoded.lost:
                    if batch[row][0] != RECENT:  # its text is part of the training text too
                        self.losses.note(f"text {done + row + 1:,} ({batch[row][0]})", lost)
                done += len(batch)
                texts_T = np.split(column.tokens_T, np.cumsum(column.sizes_N)[:-1])
                for (split, text), text_T in zip(batch, texts_T, strict=True):
                    if split not in outputs:
                        held_out = self.stage / f"{split}.txt" if split not in ("train", RECENT) else None
                        outputs[split] = SplitOutput(self.stage / prefixes[split], held_out, dtype, files)
                    size = outputs[split].add(text, text_T)
                    if split != RECENT:
                        stage.advance(size, tokens=len(text_T))
        if "train" not in outputs or not outputs["train"].totals.tokens:
            raise DatasetError("\n".join(["the tokenizer has no token for any of the training text", *self.losses.summary()]))
        return {split: output.totals for split, output in outputs.items()}


def count_tokens(tokenizer: Tokenizer, ends: int, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, plus `ends`."""
    return [len(ids) + ends for ids in tokenizer.encode_batch(texts)]


def default_workers(total_bytes: int) -> int:
    """One process for each core that may be used, but at least BYTES_A_WORKER of text for each process."""
    return max(1, min(usable_cores(), total_bytes // BYTES_A_WORKER))


class SplitOutput:
    """The pair `prefix` of one split and, at the path `held_out` when there is one, its text (documents separated by an empty line)."""

    def __init__(self, prefix: Path, held_out: Path | None, dtype: np.dtype[Any], files: ExitStack) -> None:
        self.totals = Totals()
        self._tokens = files.enter_context(IndexedDatasetWriter(prefix, dtype))
        self._text: IO[bytes] | None = files.enter_context(held_out.open("wb")) if held_out is not None else None

    def add(self, text: str, text_T: np.ndarray) -> int:
        """Bytes of the text."""
        data = text.encode()
        if not len(text_T):
            return len(data)
        if self._text is not None:
            self._text.write(b"\n\n" + data if self.totals.documents else data)
        self._tokens.add(text_T)
        self.totals.documents += 1
        self.totals.bytes += len(data)
        self.totals.tokens += len(text_T)
        return len(data)
