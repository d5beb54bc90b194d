"""The tokenizer of a directory of Hugging Face's as one of ours, with all that lies beside it, fitted to the rows of the model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.convert.errors import ConversionError
from megatron.convert.json_files import read_json, write_json
from megatron.convert.sentence_pieces import as_tokenizer, read_piece_model
from megatron.convert.tokenizers import quiet_transformers
from megatron.convert.vocabulary import NewRows, drop_entries
from megatron.data.tokenizer import NULL, Tokenizer, load_tokenizer
from megatron.data.tokenizer.companions import (
    ADDED_TOKENS,
    CONFIG,
    GENERATION,
    ROUTER_LOGITS,
    STATED,
    TOKEN_IDS,
    TOKENS,
    copy_companions,
    token_text,
)
from megatron.data.tokenizer.eod import find_stop_tokens
from megatron.data.tokenizer.gpt2 import read_gpt2
from megatron.data.tokenizer.huggingface import RustTokenizer, read_tokenizer_json
from megatron.data.tokenizer.sentence_pieces import looks_like_ranks

FILE = "tokenizer.json"
PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
"""Names that SentencePiece models go by."""
READ = f"{FILE}, vocab.json with merges.txt, or a SentencePiece model ({', '.join(PIECES)})"
OTHER_FORMS = ("tekken.json", "vocab.txt", "*.tiktoken", "vocab.json", "merges.txt", "tokenizer.model", "*.vocab", "*tokeniz*.py")
SHOWN = 4


@dataclass(frozen=True)
class Fitting:
    """What to do about tokens that the model has no rows for. `extra`: those of the tokenizer get rows ("add") or leave it ("drop"); None: the
    import ends with a sentence. `new`: special tokens to add to both. `multiple`: what the number of rows has to be divisible by where
    some are added."""

    extra: str | None = None
    new: tuple[str, ...] = ()
    multiple: int = 1


@dataclass(frozen=True)
class ImportedTokenizer:
    """The keys that name it; None for `tokenizer` where the directory holds none; the new rows that the model needs, None for none; sentences."""

    keys: dict[str, Any]
    tokenizer: Tokenizer | None
    rows: NewRows | None
    notices: tuple[str, ...]

    def total(self, rows: int) -> int:
        """Rows of the model that has `rows` before."""
        return rows if self.rows is None else self.rows.total


def import_tokenizer(directory: Path, stage: Path, final: Path, *, rows: int, fitting: Fitting) -> ImportedTokenizer:
    """Writes the tokenizer of `directory` into `stage`, which becomes `final`. `rows`: what the model has.

    Raises TokenizerError, and ConversionError for tokens without rows unless `fitting` says what to do.
    """
    copy_companions(directory, stage)
    stated = {key: value for key, value in read_json(directory / "config.json").items() if key in STATED}
    ids = {key: value for key, value in stated.items() if key != ROUTER_LOGITS}
    write_json(stage / TOKEN_IDS, stated)
    kind, name, notices = _take(directory, stage, fitting)
    if name is None:
        if fitting.new:
            raise ConversionError(
                f"--add-tokens: {directory} holds no tokenizer that can be read, so tokens cannot be added. Files that can be read: {READ}."
            )
        write_json(stage / GENERATION, {**ids, **read_json(directory / GENERATION)})
        keys = {"tokenizer_type": NULL, "vocab_size": rows, "generation_config": str(final / GENERATION)}
        return ImportedTokenizer(keys, None, None, tuple(notices))
    tokenizer = load_tokenizer(kind, stage / name)
    needed = None
    if tokenizer.vocab_size > rows:
        tokenizer, needed, sentence = _fit(directory, stage, tokenizer, rows, fitting)
        notices.append(sentence)
    if fitting.new:
        tokenizer, needed, sentence = _extend(stage, tokenizer, rows, needed, fitting)
        notices.append(sentence)
    if needed is not None:
        notices.append(needed.sentence())
    notices.append(ends(tokenizer, stage))
    return ImportedTokenizer({"tokenizer_type": kind, "vocab_file": str(final / name)}, tokenizer, needed, tuple(notices))


def _take(directory: Path, stage: Path, fitting: Fitting) -> tuple[str, str | None, list[str]]:
    """(type, name of the file in `stage`, sentences); None for the name where there is no tokenizer that can be read."""
    if (directory / FILE).is_file():
        shutil.copyfile(directory / FILE, stage / FILE)
        return "HFTokenizer", FILE, []
    pieces = next((directory / name for name in PIECES if (directory / name).is_file()), None)
    if pieces is not None and not looks_like_ranks(pieces):
        return _take_pieces(directory, pieces, stage, fitting)
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        tokenizer = read_byte_level(directory)
        add_stated(tokenizer, directory)
        tokenizer.save(str(stage / FILE))
        return "HFTokenizer", FILE, [f"{directory} has no {FILE}; it is made from vocab.json and merges.txt."]
    if pieces is not None:
        shutil.copyfile(pieces, stage / "tokenizer.model")
        return "TiktokenTokenizer", "tokenizer.model", []
    found = sorted({file.name for form in OTHER_FORMS for file in directory.glob(form)})
    other = f" (it holds {', '.join(found)}, which cannot be read)" if found else ""
    return (
        "",
        None,
        [
            f"{directory} holds no tokenizer that can be read{other}. Files that can be read: {READ}. The model is imported without a "
            "tokenizer. It can be trained on data "
            "that is already tokenized, and it can be exported. To read text, write tokenizer_type and vocab_file in config.yml in place "
            "of NullTokenizer and "
            "vocab_size."
        ],
    )


def _take_pieces(directory: Path, pieces: Path, stage: Path, fitting: Fitting) -> tuple[str, str, list[str]]:
    """A SentencePiece model as it is; as a tokenizer.json where entries come to it, or leave it."""
    tokenizer = load_tokenizer("SPMTokenizer", pieces)
    if not (stated_tokens(directory).keys() - set(range(tokenizer.vocab_size)) or fitting.new or fitting.extra):
        shutil.copyfile(pieces, stage / "tokenizer.model")
        return "SPMTokenizer", "tokenizer.model", []
    converted = as_tokenizer(read_piece_model(pieces), str(pieces))
    add_stated(converted, directory)
    converted.save(str(stage / FILE))
    return "HFTokenizer", FILE, [f"{directory} has no {FILE}; it is made from {pieces.name}."]


def read_byte_level(directory: Path) -> Any:
    """vocab.json and merges.txt as a `tokenizers.Tokenizer`: with the rules of the class that the settings name, if transformers has it and it reads
    these files (Qwen's cuts text otherwise than GPT-2's), else with GPT-2's. Raises TokenizerError for files that are damaged."""
    plain = read_gpt2(directory / "vocab.json", directory / "merges.txt")
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer
        vocabulary, own = theirs.get_vocab(with_added_tokens=True), plain.get_vocab()
        alike = all(vocabulary.get(text) == number for text, number in own.items())
        sample = "Four score, and 1863.\n"
        if alike and theirs.decode(theirs.encode(sample, add_special_tokens=False).ids) == plain.decode(plain.encode(sample).ids):
            return theirs
    except Exception:  # each class refuses in its own way, and some read other files
        return plain
    return plain


def stated_tokens(directory: Path) -> dict[int, str]:
    """The entries by their ids that the settings of a tokenizer name beside its vocabulary. Raises ConversionError for an id that is no number."""
    decoder = read_json(directory / CONFIG).get("added_tokens_decoder")
    try:
        stated = {int(number): str(token_text(token)) for number, token in (decoder if isinstance(decoder, dict) else {}).items()}
    except ValueError as error:
        raise ConversionError(f"{directory / CONFIG}: added_tokens_decoder names a token by something that is no number ({error}).") from error
    try:
        return stated | {int(number): text for text, number in read_json(directory / ADDED_TOKENS).items()}
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{directory / ADDED_TOKENS} gives a token an id that is no number ({error}).") from error


def add_stated(tokenizer: Any, directory: Path) -> None:
    """Adds the entries that the settings name: those with ids of their own in order, then named tokens that the vocabulary has."""
    from tokenizers import AddedToken

    settings = read_json(directory / CONFIG)
    decoder = settings.get("added_tokens_decoder")
    flags = {str(token_text(token)): token for token in (decoder if isinstance(decoder, dict) else {}).values() if isinstance(token, dict)}
    named = [token_text(settings.get(key)) for key in TOKENS]
    for text in dict.fromkeys([*(text for _, text in sorted(stated_tokens(directory).items())), *(text for text in named if text is not None)]):
        own = {key: bool(flags[text].get(key, False)) for key in ("lstrip", "rstrip", "single_word")} if text in flags else {}
        token = AddedToken(text, normalized=False, **own)
        if text in named or flags.get(text, {}).get("special", True):
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])


def _fit(directory: Path, stage: Path, tokenizer: Tokenizer, rows: int, fitting: Fitting) -> tuple[Tokenizer, NewRows | None, str]:
    """A tokenizer with more entries than the model has rows: as `fitting.extra` says."""
    count = tokenizer.vocab_size - rows
    names = [text for text in (tokenizer.entry(rows + i) for i in range(count)) if text] if isinstance(tokenizer, RustTokenizer) else []
    shown = ", ".join(map(repr, names[:SHOWN])) + (", ..." if count > SHOWN else "")
    which = f"{count:,} of the tokenizer's entries" + (f" ({shown})" if shown else "")
    if fitting.extra is None:
        raise ConversionError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size:,} entries, but the model has {rows:,} rows; {which} have no row. Add "
            "--extra-tokens add to give them rows (the mean of the present rows), or --extra-tokens drop to remove them from the tokenizer. "
            "If the tokenizer belongs to another model, use the right tokenizer instead."
        )
    if fitting.extra == "add":
        return tokenizer, _rows(rows, rows, tokenizer.vocab_size, fitting), f"The model has no rows for {which}: rows are added for them."
    if not (stage / FILE).is_file():
        raise ConversionError(
            f"{directory}: --extra-tokens drop needs a {FILE} or a SentencePiece model to remove entries from; the directory holds neither."
        )
    drop_entries(stage, rows)
    return load_tokenizer("HFTokenizer", stage / FILE), None, f"The model has no rows for {which}: they are removed from the tokenizer."


def _extend(stage: Path, tokenizer: Tokenizer, rows: int, needed: NewRows | None, fitting: Fitting) -> tuple[Tokenizer, NewRows | None, str]:
    """The tokenizer with `fitting.new`, and the rows that the model needs then."""
    from tokenizers import AddedToken

    if not (stage / FILE).is_file():
        raise ConversionError(f"--add-tokens needs a {FILE}, but this tokenizer cannot be written as one.")
    there = [text for text in fitting.new if tokenizer.token_to_id(text) is not None]
    missing = [text for text in dict.fromkeys(fitting.new) if text not in there]
    library = read_tokenizer_json(stage / FILE)
    library.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in fitting.new])
    library.save(str(stage / FILE))
    extended = load_tokenizer("HFTokenizer", stage / FILE)
    _name_added(stage, {text: int(number) for text in missing if (number := extended.token_to_id(text)) is not None})
    if missing:
        first = min(rows, tokenizer.vocab_size) if needed is None else needed.first
        needed = _rows(rows, first, extended.vocab_size, fitting)
    known = f" {', '.join(map(repr, there))} {'was' if len(there) == 1 else 'were'} there already." if there else ""
    added = f"Added to the tokenizer: {', '.join(f'{text!r} ({extended.token_to_id(text)})' for text in missing)}." if missing else ""
    return extended, needed, f"{added}{known}".strip()


def _rows(before: int, first: int, entries: int, fitting: Fitting) -> NewRows:
    """Rows for so many `entries`: in the place of padding that the model has, or after its last."""
    if entries <= before:
        return NewRows(before, first, entries, before)
    total = -(-entries // fitting.multiple) * fitting.multiple
    return NewRows(before, first, total, total)


def _name_added(stage: Path, added: Mapping[str, int]) -> None:
    """The new special tokens in tokenizer_config.json, in whichever form it has."""
    settings = read_json(stage / CONFIG)
    if not added or not settings:
        return
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    if isinstance(settings.get("added_tokens_decoder"), dict):
        new = {str(number): {"content": text, **flags, "special": True} for text, number in added.items()}
        settings["added_tokens_decoder"] = {**settings["added_tokens_decoder"], **new}
    key = "additional_special_tokens" if "additional_special_tokens" in settings else "extra_special_tokens"
    if isinstance(settings.get(key, []), list):
        settings[key] = [*settings.get(key, []), *added]
    write_json(stage / CONFIG, settings)


def ends(tokenizer: Tokenizer, folder: Path) -> str:
    """A sentence on what ends a document and what an answer."""
    stops = [_named(tokenizer, number) for number in find_stop_tokens(tokenizer.token_to_id, folder, tokenizer.eod)]
    if tokenizer.eod is None:
        return f"The tokenizer has no end-of-document token. Generation stops at {_all(stops)}."
    return f"Documents end with {_named(tokenizer, tokenizer.eod)}. Generation stops at {_all(stops)}."


def _named(tokenizer: Tokenizer, number: int) -> str:
    text = tokenizer.entry(number) if isinstance(tokenizer, RustTokenizer) else None
    return f"{text} ({number})" if text is not None else str(number)


def _all(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or "nothing but maximum_tokens"
