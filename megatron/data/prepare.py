"""A corpus to a folder that training reads: vocabulary, `.bin/.idx` of each split, held-out text, and a manifest of how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from megatron.data.bad_input import BadInput, OnError
from megatron.data.bpe import train_bpe
from megatron.data.corpora import TEST_FRACTION, VALID_FRACTION, Corpus, find_corpus
from megatron.data.hold_out import RECENT, Fraction, Parts, Survey
from megatron.data.indexed import DatasetError, IndexedDatasetWriter, token_dtype
from megatron.data.progress import Reporter
from megatron.data.reading import Meter
from megatron.data.split import SPLITS
from megatron.data.staging import LOCK, check_replaceable, publish, staging_folder
from megatron.data.tokenizer import Tokenizer, end_of_document, load_tokenizer
from megatron.data.tokenizer.keep import keep_tokenizer

FORMAT = 3  # raise it when the same input and settings give other files
MANIFEST = "prepared.json"
INDEX_MAPS = "index_maps"
BATCH_BYTES = 1_000_000


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
    on_error: OnError = "fail"
    force: bool = False


@dataclass
class Totals:
    """Of one split."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Prepared:
    """`left_out` tells of the input that could not be read, in lines; empty when there is none."""

    folder: Path
    up_to_date: bool
    manifest: dict[str, Any]
    left_out: tuple[str, ...] = ()


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
    if known is not None and known["settings"] == settings and not options.force and whole(target, known):
        return Prepared(target, True, known)
    if known is not None and not options.force:
        raise DatasetError(f"{target} {difference(target, known, settings)}; --force replaces it, another --name keeps both")
    check_replaceable(target, {MANIFEST, INDEX_MAPS, LOCK, *(known["files"] if known else ())})
    with staging_folder(target) as stage:
        facts, left_out = Preparation(options, corpus, reporter, stage).run()
        manifest = {"format": FORMAT, "settings": settings, **facts}
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=1))
        publish(stage, target)
    return Prepared(target, False, manifest, tuple(left_out))


def choose_corpus(options: PrepareOptions) -> Corpus:
    corpus = find_corpus(options.inputs, options.jsonl_key)
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


def read_manifest(target: Path) -> dict[str, Any] | None:
    """None: the folder was not made here, or not to the end."""
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


class Preparation:
    """One run: survey the corpus, get a tokenizer, tokenise. Writes into `stage` only."""

    def __init__(self, options: PrepareOptions, corpus: Corpus, reporter: Reporter, stage: Path) -> None:
        self.options = options
        self.corpus = corpus
        self.reporter = reporter
        self.stage = stage
        self.bad_input = BadInput(options.on_error)
        self.tokenizer_files: dict[str, str] = {}

    def run(self) -> tuple[dict[str, Any], list[str]]:
        """(the manifest's facts, what was left out)."""
        survey = self.survey()
        parts = self.corpus.hold_out.divide(survey)
        tokenizer = self.tokenizer(parts, sum(survey.sizes))
        if self.options.append_eod:
            end_of_document(tokenizer, "--append-eod (on unless --no-append-eod is given)")
        totals = self.tokenise(parts, tokenizer, survey)
        files = {path.name: path.stat().st_size for path in sorted(self.stage.iterdir()) if path.name != LOCK}
        splits = {split: asdict(total) for split, total in totals.items() if total.documents}
        used = {"tokenizer_type": self.options.tokenizer_type, "tokenizer_files": self.tokenizer_files, "vocab_size": tokenizer.vocab_size}
        return {**used, "splits": splits, "files": files}, self.bad_input.summary()

    def survey(self) -> Survey:
        survey, meter = Survey(), Meter.of(self.corpus.files)
        with self.reporter.stage("reading", meter.total) as stage:
            for document in self.corpus.documents(self.bad_input, meter):
                stage.advance(survey.note(document.text), position=min(meter.done, meter.total))
        if not survey.sizes:
            raise DatasetError("\n".join(["no text in the input", *self.bad_input.summary()]))
        return survey

    def pieces(self, parts: Parts) -> Iterator[tuple[str, str]]:
        """(split, text) in corpus order; what the survey reported is passed over."""
        for number, document in enumerate(self.corpus.documents(lambda problem: None)):
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
                for split, text in self.pieces(parts):
                    if split != RECENT:
                        stage.advance(len(text.encode()))
                    if split == "train":
                        yield text
                stage.rest(f"merging into {self.options.vocab_size:,} tokens")

            train_bpe(training_text(), self.options.vocab_size, path)
        return load_tokenizer("HFTokenizer", path)

    def tokenise(self, parts: Parts, tokenizer: Tokenizer, survey: Survey) -> dict[str, Totals]:
        with ExitStack() as files, self.reporter.stage("tokenising", sum(survey.sizes)) as stage:
            outputs = {split: SplitOutput(self.stage, split, tokenizer, self.options.append_eod, files) for split in (*SPLITS, RECENT)}
            for batch in batched_pieces(self.pieces(parts)):
                encoded = tokenizer.encode_batch([text for _, text in batch])
                for (split, text), ids in zip(batch, encoded, strict=True):
                    size = outputs[split].add(text, ids)
                    if split != RECENT:
                        stage.advance(size, tokens=len(ids))
        for split, output in outputs.items():
            if not output.totals.documents:
                for path in self.stage.glob(f"{split}[_.]*"):
                    path.unlink()
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
    """`SPLIT_text_document.bin/.idx`, and `SPLIT.txt` for the held-out splits (documents separated by an empty line)."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, append_eod: bool, files: ExitStack) -> None:
        self.totals = Totals()
        self._end = [tokenizer.eod] if append_eod and tokenizer.eod is not None else []
        self._tokens = files.enter_context(IndexedDatasetWriter(folder / f"{split}_text_document", token_dtype(tokenizer.vocab_size)))
        self._text: IO[bytes] | None = files.enter_context((folder / f"{split}.txt").open("wb")) if split not in ("train", RECENT) else None

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


def describe(prepared: Prepared) -> str:
    """What lies in the folder and which config keys read it."""
    manifest, folder = prepared.manifest, prepared.folder
    lines = [f"{folder} is up to date" if prepared.up_to_date else f"{folder} written", ""]
    lines.append(f"{'split':8}{'documents':>12}{'bytes':>16}{'tokens':>14}{'bytes/token':>13}")
    for split, total in manifest["splits"].items():
        lines.append(f"{split:8}{total['documents']:12,}{total['bytes']:16,}{total['tokens']:14,}{total['bytes'] / total['tokens']:13.3f}")
    lines += ["", f"vocabulary: {manifest['vocab_size']:,}. Config keys:", ""]
    paths = {split: json.dumps(str(folder / f"{split}_text_document")) for split in manifest["splits"]}
    recent = paths.pop(RECENT, None)
    if len(paths) == len(SPLITS):
        lines += [f"  {split}_data_paths: [{path}]" for split, path in paths.items()]
    else:
        lines += [f"  data_path: {paths['train']}", "  split: '1'"]
    lines.append(f"  tokenizer_type: {manifest['tokenizer_type']}")
    for key, name in manifest["tokenizer_files"].items():
        lines.append(f"  {key}: {json.dumps(str(folder / name) if name in manifest['files'] else name)}")
    if recent is not None:
        lines.append(f"  (the newest training documents again, to blend in by train_data_weights: {recent})")
    if prepared.left_out:
        lines += ["", *prepared.left_out]
    return "\n".join(lines)
