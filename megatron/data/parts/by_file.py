"""`prepare_data.py --by-file`: every input file becomes a part, by several processes and machines; the parts become one pair.

DIR/NAME.parts/ holds the parts until the pair is complete. A killed run loses the parts that were being written, and nothing else. Machines share
the files by number (`--part 2/8`), not by claims: this needs neither a shared disk nor locks, which some cluster disks do not have. On one disk a
lock keeps two processes from writing the same part.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron.config.machine import usable_cores
from megatron.data.corpus.hold_out import NOTHING
from megatron.data.folders import remove_folder
from megatron.data.indexed import DatasetError, token_dtype
from megatron.data.locking import naming
from megatron.data.parts.fetch import AT_ONCE, Fetcher
from megatron.data.parts.files import BY_FILE, download, folder_of_subset, hub_files, local_files, subset_for
from megatron.data.parts.join import checksums, join
from megatron.data.parts.record import SETTINGS, InputFile, Record, check_part, digest_of, read_record, record_path, why_not, write_json
from megatron.data.parts.work import Counts, Job, PartTask, pool
from megatron.data.preprocessing.encode import TextTask
from megatron.data.preprocessing.prepare import FORMAT, INDEX_MAPS, PrepareOptions
from megatron.data.preprocessing.prepared import MANIFEST, Prepared, difference, read_manifest, whole
from megatron.data.progress import Reporter
from megatron.data.staging import LOCK, check_replaceable, followed, publish, staging_folder
from megatron.data.tokenizer.keep import keep_tokenizer

LISTING = "files.json"
MARGIN = 1.02
"""How much more than the limit is read where tokens are only estimated."""
BY_ITSELF = 1_000_000_000
"""From so many tokens on, corpora whose files are known are prepared by file."""
VERIFIED = "All checksums are those that were written down"
NEEDS_TOKENIZER = "--by-file tokenises each file for itself, so it needs a tokenizer that exists already. Give -v FILE (and -t TYPE)"


class PartsReport(NamedTuple):
    """What `--part` or `--verify` has done. `left`: files of all machines without a part. `verified`: checksums were
    compared and nothing was made."""

    folder: Path
    made: int
    whole: int
    left: int
    tokens: int
    verified: bool = False


@dataclass(frozen=True)
class Source:
    """`repository` None: the files are local. `identity` is what the text depends on, as JSON."""

    name: str
    identity: list[Any]
    repository: str | None = None
    folder: str = ""


def is_by_file(options: PrepareOptions) -> bool:
    """Whether the options ask for it, or the corpus is so large that it should be."""
    if options.by_file is not None or options.part is not None or options.verify or options.keep_parts:
        return options.by_file is not False
    tokens = options.limits.tokens
    return len(options.inputs) == 1 and options.inputs[0] in BY_FILE and (tokens == "all" or (isinstance(tokens, int) and tokens >= BY_ITSELF))


def source_of(options: PrepareOptions) -> Source:
    """Raises DatasetError."""
    first = options.inputs[0] if options.inputs else ""
    if first in BY_FILE:
        if len(options.inputs) > 1:
            raise DatasetError(f"{first!r} is a named corpus and cannot be mixed with other input")
        wanted = options.limits.tokens
        subset = subset_for(first, wanted if isinstance(wanted, int) else None, options.subset)
        return Source(first, [first, subset], BY_FILE[first][0], folder_of_subset(first, subset))
    if options.subset is not None:
        raise DatasetError(f"--subset {options.subset}: only {', '.join(BY_FILE)} have subsets that are prepared by file")
    paths = [Path(text) for text in options.inputs]
    if not paths:
        raise DatasetError(f"--by-file needs files or folders, or one of the corpora {', '.join(BY_FILE)}")
    name = paths[0].resolve().name if paths[0].is_dir() else paths[0].name.split(".")[0]
    return Source(name or "text", [])


def check_options(options: PrepareOptions) -> None:
    if options.tokenizer_file is None and options.tokenizer_type == "HFTokenizer":
        raise DatasetError(NEEDS_TOKENIZER)
    if options.limits.bytes not in (None, "all"):
        raise DatasetError("--max-bytes cannot be used with --by-file, which limits documents and tokens; give --tokens or --max-documents")
    if options.valid_fraction is not None or options.test_fraction is not None:
        raise DatasetError(
            "--by-file holds nothing out: the configuration key `split` divides the pair. Leave --valid-fraction and --test-fraction out"
        )
    if options.workers < 0:
        raise DatasetError(f"--workers {options.workers}: give 1 or more, or 0 for one on each core")


def prepare_by_file(options: PrepareOptions, reporter: Reporter) -> Prepared | PartsReport:
    """Makes the folder DIR/NAME, or with `--part` only parts. Raises DatasetError, TokenizerError or WorkerError with a sentence for the user."""
    check_options(options)
    work = ByFile(options, reporter)
    known = read_manifest(work.target)
    if known is not None and not (options.force or options.force_redownload):
        if options.verify and "sha256" not in known:
            raise DatasetError(f"{work.target} was not prepared by file, so there are no checksums to compare; prepare it with --by-file")
        if known["settings"] != work.settings or not whole(work.target, known):
            raise DatasetError(f"{work.target} {difference(work.target, known, work.settings)}; --force replaces it, and another --name keeps both")
        if options.verify:
            verify_folder(work.target, known, reporter)
        return Prepared(work.target, True, known, (VERIFIED,) if options.verify else ())
    if options.verify and not any(work.folder.glob("*.json")):
        raise DatasetError(
            f"--verify: neither {work.target} nor {work.folder} is there, so there is nothing to check; give the command without --verify"
        )
    work.begin()
    made = 0 if options.verify else work.make_parts()
    if options.verify or options.part is not None:
        left = sum(work.is_wanted(number) for number in range(len(work.files)))
        return PartsReport(work.folder, made, len(work.records), left, sum(record.tokens for record in work.records.values()), options.verify)
    while any(work.is_wanted(number) for number in range(len(work.files))):
        work.make_parts()  # the estimate of the first round was too low
    return work.finish(known)


def verify_folder(target: Path, manifest: dict[str, Any], reporter: Reporter) -> None:
    wanted: dict[str, str] = manifest["sha256"]
    found = checksums([target / name for name in wanted], reporter)
    damaged = next((name for name in wanted if found[name] != wanted[name]), None)
    if damaged is not None:
        raise DatasetError(f"{target / damaged} is damaged: its checksum is not the one that was written down. Prepare it again with --force")


class ByFile:
    """One run. `records` are those of the parts that are whole."""

    def __init__(self, options: PrepareOptions, reporter: Reporter) -> None:
        self._options, self._reporter = options, reporter
        self.source = source_of(options)
        directory = Path(options.directory)
        self.target = followed(directory / (options.name or self.source.name))
        self.folder = self.target.with_name(f"{self.target.name}.parts")
        self._downloads = directory / "fetched" / f"{self.source.name}-files"
        self._text = TextTask(options.tokenizer_type, options.tokenizer_file, options.merge_file, options.append_eod)
        tokenizer = self._text.load()
        self._vocab_size = tokenizer.vocab_size
        given = [self._text.vocab_file, self._text.merge_file]
        self._of_parts = {
            "format": FORMAT,
            "tokenizer_type": options.tokenizer_type,
            "tokenizer": [digest_of(Path(path)) if path is not None and Path(path).is_file() else path for path in given],
            "eod": tokenizer.eod if options.append_eod else None,
            "jsonl_key": options.jsonl_key,
            "input_format": options.input_format,
            "on_error": options.on_error,
        }
        self._digest = hashlib.sha256(json.dumps(self._of_parts, sort_keys=True).encode()).hexdigest()
        self._limits = options.limits.numbers()
        self.revision = ""
        self.files: list[InputFile] = [] if self.source.repository else local_files(options.inputs)
        self.records: dict[int, Record] = {}
        self.notes: list[str] = []
        listed = self.source.identity or [[file.name, file.size, file.path.stat().st_mtime_ns] for file in self.files]
        settings = {**self._of_parts, "input": listed, "limits": self._limits, "hold_out": [type(NOTHING).__name__, vars(NOTHING)], "by_file": True}
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))

    def begin(self) -> None:
        """Finds the parts that are whole. Raises DatasetError if the folder of parts belongs to other settings."""
        if self._options.force_redownload and self.source.repository is not None:
            remove_folder(self._downloads)
            remove_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / SETTINGS
        wanted = json.loads(json.dumps({**self._of_parts, "source": self.source.identity}))
        if path.is_file() and (before := json.loads(path.read_text(encoding="utf-8"))) != wanted:
            changed = ", ".join(key for key in wanted if before.get(key) != wanted[key])
            if not self._options.force:
                raise DatasetError(
                    f"{self.folder} holds parts made with other settings ({changed}). --force makes them again, and another --name keeps both"
                )
            remove_folder(self.folder)
            self.folder.mkdir(parents=True)
        if not path.is_file():
            write_json(path, wanted)
        if self.source.repository is not None:
            self.files = self._listing(self.source.repository)
        for number, file in enumerate(self.files):
            self._look_at(number, file)

    def _listing(self, repository: str) -> list[InputFile]:
        """The files on the hub, as the first run found them: every later one, on every machine with this folder, reads the same revision."""
        path = self.folder / LISTING
        if not path.is_file():
            self.revision, files = hub_files(repository, self.source.folder, self._downloads)
            write_json(path, {"revision": self.revision, "files": [file[:3] for file in files]})
        known = json.loads(path.read_text(encoding="utf-8"))
        self.revision = known["revision"]
        return [InputFile(name, size, digest, self._downloads / name) for name, size, digest in known["files"]]

    def _look_at(self, number: int, file: InputFile) -> None:
        prefix = file.prefix(self.folder)
        record = read_record(prefix)
        if record is None and self._options.verify and record_path(prefix).is_file():
            raise DatasetError(
                f"{prefix} is damaged: a file of this part is missing or cut short. The command without --verify makes this part again"
            )
        if record is None or not record.serves(self._limits):
            return
        changed = why_not(record, file, self._digest)
        if changed is not None and self._options.verify:
            raise DatasetError(f"{prefix} is no longer the part of {file.path}: {changed}. The command without --verify makes this part again")
        if changed is not None:
            self.notes.append(f"note: the part of {file.name} is made again, because {changed}")
            return
        if self._options.verify:
            check_part(prefix, record)
        self.records[number] = record

    def _made_elsewhere(self, number: int) -> bool:
        """Whether another process has made the part since this one has looked."""
        file = self.files[number]
        record = read_record(file.prefix(self.folder))
        if number not in self.records and record is not None and record.serves(self._limits) and why_not(record, file, self._digest) is None:
            self.records[number] = record
        return number in self.records

    def is_wanted(self, number: int) -> bool:
        """Whether a part is missing that the pair needs. Tokens of files without a part are estimated from the others."""
        if number in self.records:
            return False
        for name, limit in self._limits.items():
            known = sum(getattr(record, name) for record in self.records.values())
            size = sum(record.size for record in self.records.values())
            before = [getattr(self.records[place], name) for place in range(number) if place in self.records]
            unknown = sum(file.size for place, file in enumerate(self.files[:number]) if place not in self.records)
            if sum(before) + (unknown * known / size / MARGIN if size else 0) >= limit:
                return False
        return True

    def make_parts(self) -> int:
        """Makes the parts of this machine's files that are wanted, until there are none. Returns how many it made."""
        first, machines = self._options.part or (1, 1)
        waiting = deque(number for number in range(first - 1, len(self.files), machines) if number not in self.records)
        workers = min(self._options.workers or usable_cores(), max(len(waiting), 1))
        task = PartTask(
            text=self._text,
            dtype=token_dtype(self._vocab_size),
            settings=self._digest,
            jsonl_key=self._options.jsonl_key,
            on_error=self._options.on_error,
            input_format=self._options.input_format,
            limits=self._limits,
        )
        total = self._total(waiting, machines)
        taken: list[InputFile] = []
        made = position = 0
        fetcher = Fetcher(self.fetch)
        with pool(task, workers) as processes, self._reporter.stage("tokenising", total) as stage:

            def tell(counts: Counts) -> None:
                nonlocal position
                position += counts.position
                done = position if "tokens" not in self._limits else min(stage.tokens + counts.tokens, total or 0)
                stage.advance(counts.bytes, counts.documents, counts.tokens, position=done)

            def next_job() -> Job | None:
                while waiting and (self._made_elsewhere(waiting[0]) or not self.is_wanted(waiting[0])):
                    waiting.popleft()
                if not waiting or (processes.is_busy and not fetcher.has(waiting[0])):
                    return None
                fetcher.ahead([number for number in list(waiting)[: workers + AT_ONCE] if self.is_wanted(number)])
                file = fetcher.file(waiting.popleft())
                return Job(file, file.prefix(self.folder))

            numbers = {file.name: number for number, file in enumerate(self.files)}
            for job, record in processes.run(next_job, tell):
                if record is None:
                    taken.append(job.file)
                    continue
                self.records[numbers[job.file.name]] = record
                made += 1
        if taken and self._options.part is None:
            raise DatasetError(
                f"another process is writing {len(taken)} part(s) of {self.folder} ({taken[0].name}); the parts made here are kept. Give the command "
                "again when it has ended"
            )
        return made

    def fetch(self, number: int) -> InputFile:
        """The file, which is downloaded if it is on the hub and not here. Raises DatasetError."""
        if self.source.repository is None:
            return self.files[number]
        return download(self.source.repository, self.revision, self.files[number], self._downloads)

    def _total(self, waiting: Sequence[int], machines: int) -> int | None:
        """What the progress bar counts to: the tokens that are missing, or the bytes of the files."""
        if "tokens" in self._limits:
            return max((self._limits["tokens"] - sum(record.tokens for record in self.records.values())) // machines, 1)
        return sum(self.files[number].size for number in waiting) or None

    def finish(self, known: dict[str, Any] | None) -> Prepared:
        """The pair of all parts, in the folder that training reads. Parts are removed then, unless --keep-parts."""
        needed: list[tuple[Path, Record]] = []
        for number, file in enumerate(self.files):
            if number not in self.records:
                break
            needed.append((file.prefix(self.folder), self.records[number]))
        if not sum(record.tokens for _, record in needed):
            raise DatasetError("no text in the input")
        check_replaceable(self.target, {MANIFEST, INDEX_MAPS, LOCK, *(known["files"] if known else ())})
        name = f"{self.target.name}_text_document"
        with naming(self.target.parent), staging_folder(self.target) as stage:
            kept = keep_tokenizer(self._options.tokenizer_type, {"vocab_file": self._text.vocab_file, "merge_file": self._text.merge_file}, stage)
            totals = join(needed, stage / name, token_dtype(self._vocab_size), self._limits, self._reporter)
            files = {path.name: path.stat().st_size for path in sorted(stage.iterdir()) if path.name != LOCK}
            used = {"tokenizer_type": self._options.tokenizer_type, "tokenizer_files": kept, "vocab_size": self._vocab_size}
            left_out: dict[str, int] = {}
            for _, record in needed:
                left_out = {kind: left_out.get(kind, 0) + record.left_out.get(kind, 0) for kind in {*left_out, *record.left_out}}
            pair = {"splits": {"train": totals}, "prefixes": {"train": name}, "files": files, "left_out": left_out, "revision": self.revision}
            digests = checksums([stage / f"{name}.bin", stage / f"{name}.idx"], self._reporter)
            manifest = {"format": FORMAT, "settings": self.settings, **used, **pair, "sha256": digests}
            (stage / MANIFEST).write_text(json.dumps(manifest, indent=1))
            publish(stage, self.target)
        if not self._options.keep_parts:
            remove_folder(self.folder)
        notes = [f"{prefix.name}: {note}" for prefix, record in needed for note in record.notes]
        return Prepared(self.target, False, manifest, (*self.notes, *self._short(), *notes))

    def _short(self) -> list[str]:
        """A sentence if the corpus has less than was asked for."""
        return [
            f"note: the corpus has only {sum(record.tokens for record in self.records.values()):,} tokens; --tokens {limit:,} was asked for"
            for name, limit in self._limits.items()
            if name == "tokens" and len(self.records) == len(self.files) and sum(record.tokens for record in self.records.values()) < limit
        ]


def describe_parts(report: PartsReport) -> str:
    if report.verified:
        lines = [f"{report.folder}: {report.whole:,} parts, {report.tokens:,} tokens. {VERIFIED}"]
        if report.left:
            lines.append(f"{report.left:,} more parts are not made yet; the command without --verify makes them")
        return "\n".join(lines)
    lines = [f"{report.folder}: {report.made:,} parts made, {report.whole:,} whole in this folder, {report.tokens:,} tokens"]
    if report.left:
        lines.append(
            f"{report.left:,} more files are to do, by other machines. Copy their parts into this folder, or give the same command without --part"
        )
    else:
        lines.append("All parts are here. The same command without --part makes the pair of them")
    return "\n".join(lines)
