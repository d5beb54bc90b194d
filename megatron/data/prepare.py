"""A corpus to a folder that training reads: vocabulary, `.bin/.idx` of each split, held-out text, and a manifest of how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from megatron.data.bad_input import BadInput, OnError
from megatron.data.bpe import train_bpe
from megatron.data.corpora import TEST_FRACTION, VALID_FRACTION, Corpus, Request, find_corpus
from megatron.data.hold_out import NOTHING, RECENT, Fraction, Parts, Survey
from megatron.data.indexed import DatasetError, IndexedDatasetWriter, token_dtype
from megatron.data.limits import CountTokens, Limiter, Limits
from megatron.data.prepared import MANIFEST, Prepared, difference, read_manifest, whole
from megatron.data.progress import Reporter
from megatron.data.split import SPLITS
from megatron.data.staging import LOCK, check_replaceable, publish, staging_folder
from megatron.data.tokenizer import Tokenizer, end_of_document, load_tokenizer
from megatron.data.tokenizer.keep import keep_tokenizer

FORMAT = 4  # raise it when the same input and settings give other files
INDEX_MAPS = "index_maps"
BATCH_BYTES = 1_000_000
MOST_TRAINING_BYTES = 1 << 30  # of text for a vocabulary: words that come up later are rare, and all are counted in memory
WHOLE = 1_000_000  # what a progress bar counts to where bytes are not what is measured


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What the command line says; see `prepare_data.py --help`."""

    inputs: tuple[str, ...] = ()
    directory: str = "data"
    name: str | None = None
    vocab_size: int = 8192
    tokenizer_type: str = "HFTokenizer"
    tokenizer_file: str | None = None
    merge_file: str | None = None
    jsonl_key: str = "text"
    append_eod: bool = True
    valid_fraction: float | None = None
    test_fraction: float | None = None
    subset: str | None = None
    max_documents: int | str | None = None
    max_bytes: int | str | None = None
    max_tokens: int | str | None = None
    on_error: OnError = "fail"
    force: bool = False
    force_redownload: bool = False

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
    """Makes `directory/name`, whole or not at all; does nothing when it is there and was made from the same input and settings.

    Raises DatasetError or TokenizerError with a sentence for the user.
    """
    corpus = choose_corpus(options)
    target = Path(options.directory) / (corpus.name if options.name is None else options.name)
    if target.name in ("", "..") or options.name not in (None, target.name):
        raise DatasetError(f"--name {options.name!r}: give the name of one folder; -d says where it goes")
    settings = settings_of(options, corpus)
    known = read_manifest(target)
    anew = options.force or options.force_redownload
    if known is not None and known["settings"] == settings and not anew and whole(target, known):
        return Prepared(target, True, known)
    if known is not None and not anew:
        raise DatasetError(f"{target} {difference(target, known, settings)}; --force replaces it, another --name keeps both")
    check_replaceable(target, {MANIFEST, INDEX_MAPS, LOCK, *(known["files"] if known else ())})
    with staging_folder(target) as stage:
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
    """What a file's content shows itself by; what is no file stands for itself."""
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
        self.tokenizer_files: dict[str, str] = {}
        self.count = 0

    def run(self, name: str) -> tuple[dict[str, Any], list[str]]:
        """(the manifest's facts, what was left out). `name`: what the pair is called when nothing is held out, as GPT-NeoX calls it."""
        self.corpus.begin(self.reporter)
        survey = self.survey()
        self.count = len(survey.sizes)
        parts = self.corpus.hold_out.divide(survey)
        tokenizer = self.tokenizer(parts, sum(survey.sizes))
        if self.options.append_eod:
            end_of_document(tokenizer, "--append-eod (on unless --no-append-eod is given)")
        prefixes = {split: f"{name if self.corpus.hold_out == NOTHING else split}_text_document" for split in (*SPLITS, RECENT)}
        totals = self.tokenise(parts, tokenizer, survey, prefixes)
        files = {path.name: path.stat().st_size for path in sorted(self.stage.iterdir()) if path.name != LOCK}
        splits = {split: asdict(totals[split]) for split in prefixes if split in totals}
        used = {"tokenizer_type": self.options.tokenizer_type, "tokenizer_files": self.tokenizer_files, "vocab_size": tokenizer.vocab_size}
        facts = {**used, "splits": splits, "prefixes": {split: prefixes[split] for split in splits}, "files": files}
        return {**facts, "left_out": dict(self.bad_input.counts)}, self.bad_input.summary()

    def survey(self) -> Survey:
        """Reads all that is taken of the corpus once, fetching what is not there yet."""
        survey, meter, limiter = Survey(), self.corpus.meter(), Limiter(self.options.limits, self.token_counter())
        total = WHOLE if meter.total or limiter.limits else None
        with self.reporter.stage("reading", total) as stage, closing(limiter.take(self.corpus.documents(self.bad_input, meter))) as documents:
            for document in documents:
                share = max(limiter.fraction, min(meter.done / meter.total, 1.0) if meter.total else 0.0)
                stage.advance(survey.note(document.text), position=round(share * WHOLE))
        if not survey.sizes:
            raise DatasetError("\n".join(["no text in the input", *self.bad_input.summary()]))
        return survey

    def token_counter(self) -> CountTokens | None:
        """None: the tokenizer is trained on the text, so that it cannot measure it before."""
        options = self.options
        if options.max_tokens is None or (options.tokenizer_type == "HFTokenizer" and options.tokenizer_file is None):
            return None
        tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_file, options.merge_file)
        end = int(options.append_eod)
        return lambda texts: [len(ids) + end for ids in tokenizer.encode_batch(texts)]

    def pieces(self, parts: Parts) -> Iterator[tuple[str, str]]:
        """(split, text) of the documents that the survey counted; what it reported is passed over."""
        with closing(self.corpus.documents(lambda problem: None)) as documents:
            for number, document in zip(range(self.count), documents):  # noqa: B905  # the corpus goes on where a limit ended the survey
                yield from parts.pieces(number, document.text)

    def tokenizer(self, parts: Parts, total: int) -> Tokenizer:
        """A given one is copied into the folder; else one is trained on the training part."""
        options = self.options
        if options.tokenizer_type != "HFTokenizer" or options.tokenizer_file is not None:
            tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_file, options.merge_file)
            given = {"vocab_file": options.tokenizer_file, "merge_file": options.merge_file}
            self.tokenizer_files = keep_tokenizer(options.tokenizer_type, given, self.stage)
            return tokenizer
        path = self.stage / "tokenizer.json"
        self.tokenizer_files = {"vocab_file": path.name}
        with self.reporter.stage("counting words", total) as stage:

            def training_text() -> Iterator[str]:
                sparse = -(-total // MOST_TRAINING_BYTES)  # of a huge corpus, every so manieth document
                for number, (split, text) in enumerate(self.pieces(parts)):
                    if split != RECENT:
                        stage.advance(len(text.encode()))
                    if split == "train" and number % sparse == 0:
                        yield text
                stage.rest(f"merging into {self.options.vocab_size:,} tokens")

            train_bpe(training_text(), self.options.vocab_size, path)
        return load_tokenizer("HFTokenizer", path)

    def tokenise(self, parts: Parts, tokenizer: Tokenizer, survey: Survey, prefixes: dict[str, str]) -> dict[str, Totals]:
        outputs: dict[str, SplitOutput] = {}
        with ExitStack() as files, self.reporter.stage("tokenising", sum(survey.sizes)) as stage:
            for batch in batched_pieces(self.pieces(parts)):
                encoded = tokenizer.encode_batch([text for _, text in batch])
                for (split, text), ids in zip(batch, encoded, strict=True):
                    if split not in outputs:
                        held_out = self.stage / f"{split}.txt" if split not in ("train", RECENT) else None
                        outputs[split] = SplitOutput(self.stage / prefixes[split], held_out, tokenizer, self.options.append_eod, files)
                    size = outputs[split].add(text, ids)
                    if split != RECENT:
                        stage.advance(size, tokens=len(ids))
        return {split: output.totals for split, output in outputs.items()}


def batched_pieces(pieces: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Lists of about BATCH_BYTES characters, at least one piece each."""
    position = 0

    def number(piece: tuple[str, str]) -> int:
        nonlocal position
        position += len(piece[1])
        return position // BATCH_BYTES

    for _, group in groupby(pieces, key=number):
        yield list(group)


class SplitOutput:
    """The pair `prefix` of one split and, at the path `held_out` when there is one, its text (documents separated by an empty line)."""

    def __init__(self, prefix: Path, held_out: Path | None, tokenizer: Tokenizer, append_eod: bool, files: ExitStack) -> None:
        self.totals = Totals()
        self._end = [tokenizer.eod] if append_eod and tokenizer.eod is not None else []
        self._tokens = files.enter_context(IndexedDatasetWriter(prefix, token_dtype(tokenizer.vocab_size)))
        self._text: IO[bytes] | None = files.enter_context(held_out.open("wb")) if held_out is not None else None

    def add(self, text: str, ids: list[int]) -> int:
        """Bytes of the text."""
        data = text.encode()
        if self._text is not None:
            self._text.write(b"\n\n" + data if self.totals.documents else data)
        self._tokens.add(ids + self._end)
        self.totals.documents += 1
        self.totals.bytes += len(data)
        self.totals.tokens += len(ids) + len(self._end)
        return len(data)
