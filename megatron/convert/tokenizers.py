"""A tokenizer of ours as Hugging Face's."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron.config.data import DataConfig
from megatron.convert.errors import ConversionError
from megatron.convert.json_files import read_json, write_json
from megatron.convert.sentence_pieces import UNKNOWN, as_tokenizer, read_piece_model
from megatron.data.tokenizer import NULL, Tokenizer, build_tokenizer
from megatron.data.tokenizer.companions import CONFIG, GENERATION, TOKEN_IDS, copy_companions, folder_of, token_text
from megatron.data.tokenizer.huggingface import RustTokenizer

SAMPLE = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and dedicated to the "
    "proposition that all men are created equal. Now we are engaged in a great civil war, testing whether that nation, or any nation so "
    "conceived and so dedicated, can long endure. We are met on a great battle-field of that war.\n\n"
    "Wir sind's: 1,863 Menschen — naïve œuvres, 東京!\n"
)
"""Lincoln at Gettysburg, 1863, and some characters of other kinds: the text on which tokenizers and models are compared."""
WITHOUT = "add --no_save_tokenizer to export the model without a tokenizer"
FAST = "PreTrainedTokenizerFast"
"""The class of transformers that takes a tokenizer.json as it is."""
NAMED = ("bos", "eos", "pad")


class SpecialTokens(NamedTuple):
    """Ids for config.json, one or several each; None where there is no such token."""

    bos: int | list[int] | None = None
    eos: int | list[int] | None = None
    pad: int | list[int] | None = None


def save_tokenizer(data: DataConfig, directory: Path) -> SpecialTokens:
    """Writes the tokenizer's files with what lies beside ours: settings, named tokens, chat templates. Nothing for a NullTokenizer.

    `check_tokenizer` compares it once config.json is there too. Raises TokenizerError, and ConversionError for one that Hugging Face has no form for.
    """
    ours = build_tokenizer(data)
    if data.tokenizer_type == NULL:
        return special_tokens(data, ours, {})
    if data.tokenizer_type not in WRITERS:
        raise ConversionError(f"tokenizer_type {data.tokenizer_type} cannot be written as a Hugging Face tokenizer: {WITHOUT}.")
    settings = WRITERS[data.tokenizer_type](ours, data, directory)
    folder = folder_of(data)
    stored = read_json(folder / CONFIG) if folder is not None else {}
    if folder is not None:
        copy_companions(folder, directory)
        (directory / TOKEN_IDS).unlink(missing_ok=True)
    if stored and folder is not None and (folder / TOKEN_IDS).is_file():
        settings = {}  # an import goes back as it came
    settings |= stored
    if settings.pop("auto_map", None) is not None:  # its code does not go along, nor the name of a class in it
        settings["tokenizer_class"] = FAST
    write_json(directory / CONFIG, settings)
    return special_tokens(data, ours, settings)


def stated_tokens(data: DataConfig) -> SpecialTokens:
    """The ids that config.json of the imported model has; none where the model was not imported."""
    stated = imported_ids(data) or {}
    return SpecialTokens(**{kind: stated.get(f"{kind}_token_id") for kind in NAMED})


def imported_ids(data: DataConfig) -> dict[str, Any] | None:
    """The STATED entries as config.json of the imported model has them; None where the model was not imported."""
    folder = folder_of(data)
    return read_json(folder / TOKEN_IDS) if folder is not None and (folder / TOKEN_IDS).is_file() else None


def special_tokens(data: DataConfig, ours: Tokenizer, settings: dict[str, Any]) -> SpecialTokens:
    """What config.json is to say: the ids of the model that was imported, or those of the tokens that `settings` (tokenizer_config.json) names.
    A tokenizer of ours without such settings ends a text where it ends a document."""
    if imported_ids(data) is not None:
        return stated_tokens(data)
    found: dict[str, Any] = {}
    for kind in NAMED:
        text = token_text(settings.get(f"{kind}_token"))
        found[kind] = None if text is None else ours.token_to_id(text)
    if found["eos"] is None:
        found["eos"] = ours.eod
    return SpecialTokens(**found)


def token_settings(data: DataConfig, special: SpecialTokens) -> dict[str, Any]:
    """`special` as entries of config.json. What the config.json of an imported model did not have stays out: its class has values of its own."""
    stated = imported_ids(data)
    entries = {f"{kind}_token_id": token for kind, token in special._asdict().items()}
    return {key: token for key, token in entries.items() if stated is None or token is not None or key in stated}


def check_tokenizer(data: DataConfig, directory: Path) -> str | None:
    """Compares what transformers reads in SAMPLE, and its special tokens, with ours. Where the class that tokenizer_config.json names reads it
    otherwise, the class that takes tokenizer.json as it is replaces it, and a sentence says so, also where that changes nothing. None: all is well.

    Raises ConversionError when that one reads otherwise too.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours = build_tokenizer(data)
    if reads_alike(ours, directory, AutoTokenizer):
        return None
    settings = read_json(directory / CONFIG)
    named = settings.get("tokenizer_class")
    if named != FAST:
        write_json(directory / CONFIG, {**settings, "tokenizer_class": FAST})
        if reads_alike(ours, directory, AutoTokenizer):
            return (
                f"tokenizer_config.json names the class {FAST}: {named or 'the class of the model'} in this version of transformers "
                "splits text into other tokens."
            )
        write_json(directory / CONFIG, settings)
    if reads_alike(ours, directory, PreTrainedTokenizerFast):
        return (
            "For this export, AutoTokenizer of transformers always takes the tokenizer class of the model's type. That class splits "
            "text into other tokens than in training. Load the tokenizer with transformers.PreTrainedTokenizerFast.from_pretrained(...)."
        )
    raise ConversionError(f"the exported tokenizer splits a text into other tokens than {data.tokenizer_type}: {WITHOUT}.")


def reads_alike(ours: Tokenizer, directory: Path, loader: Any) -> bool:
    """Whether what `loader`, a class of transformers, loads from `directory` reads SAMPLE as ours does, and has the same special tokens."""
    try:
        with quiet_transformers():
            theirs = loader.from_pretrained(directory, trust_remote_code=False)
        read = theirs.encode(SAMPLE, add_special_tokens=False, verbose=False)
    except Exception:  # each class refuses in its own way
        return False
    if isinstance(ours, RustTokenizer) and any(theirs.convert_tokens_to_ids(name) != number for name, number in ours.added_tokens().items()):
        return False
    return bool(read == without_added(ours, ours.encode(SAMPLE), theirs))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps back warnings of transformers, which must be imported: a tokenizer beside a model of a type that it does not have gives one."""
    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def without_added(ours: Tokenizer, ids: list[int], theirs: Any) -> list[int]:
    """`ids` without the special tokens that ours puts around every text by the template of its file."""
    around = ours.encode("")
    special = set(theirs.all_special_ids)
    while around and ids and ids[0] in special and ids[0] == around[0]:
        ids, around = ids[1:], around[1:]
    return ids[: len(ids) - len(around)] if around and ids[-len(around) :] == around else ids


def kept_generation(data: DataConfig) -> dict[str, Any]:
    """How an imported model generates, from beside its tokenizer; empty where nothing says it."""
    folder = folder_of(data)
    settings = read_json(folder / GENERATION) if folder is not None else {}
    return {key: value for key, value in settings.items() if key != "transformers_version" and value is not None}


def _write_fast(ours: Tokenizer, data: DataConfig, directory: Path) -> dict[str, Any]:
    """What the tokenizers library runs: the file itself where there is one. Returns the settings where none lie beside it."""
    assert isinstance(ours, RustTokenizer)
    given = Path(str(data.vocab_file))
    file = given / "tokenizer.json" if given.is_dir() else given
    if data.tokenizer_type == "HFTokenizer" and file.is_file():
        shutil.copyfile(file, directory / "tokenizer.json")
    else:
        ours.save(directory / "tokenizer.json")
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, "tokenizer_class": FAST}
    if ours.eod is not None:
        settings["eos_token"] = ours.entry(ours.eod)
    return settings


def _write_sentence_pieces(ours: Tokenizer, data: DataConfig, directory: Path) -> dict[str, Any]:
    """The pieces as a tokenizer.json; the SentencePiece model lies beside it."""
    file = Path(str(data.vocab_file))
    model = read_piece_model(file)
    shutil.copyfile(file, directory / "tokenizer.model")
    as_tokenizer(model, str(file)).save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": next(iter(model.named(UNKNOWN)), None)}
    held = {piece.text for piece in model.pieces}
    settings = {"clean_up_tokenization_spaces": False, "tokenizer_class": FAST}
    return settings | {key: name for key, name in names.items() if name in held}


def _write_tiktoken(ours: Tokenizer, data: DataConfig, directory: Path) -> dict[str, Any]:
    """Llama 3's ranks as a byte-level BPE."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from megatron.data.tokenizer.tiktoken_ranks import LLAMA3_PATTERN, LLAMA3_SPECIAL

    if not Path(str(data.vocab_file)).is_file():
        raise ConversionError(f"vocab_file {data.vocab_file}: only Llama 3's file can be written as a Hugging Face tokenizer: {WITHOUT}.")
    special = ["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_special_token_{number}|>" for number in range(LLAMA3_SPECIAL - 2)]
    converted = TikTokenConverter(str(data.vocab_file), pattern=LLAMA3_PATTERN, extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted, bos_token=special[0], eos_token=special[1])
    tokenizer.save_pretrained(directory)
    return read_json(directory / CONFIG)


WRITERS: dict[str, Callable[[Tokenizer, DataConfig, Path], dict[str, Any]]] = {
    "HFTokenizer": _write_fast,
    "GPT2BPETokenizer": _write_fast,
    "HFGPT2Tokenizer": _write_fast,
    "SPMTokenizer": _write_sentence_pieces,
    "TiktokenTokenizer": _write_tiktoken,
}
"""Our type -> what writes its files and returns tokenizer_config.json for one that has none beside it."""
