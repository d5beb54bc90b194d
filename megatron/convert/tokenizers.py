"""A tokenizer of ours as Hugging Face's, and the other way round."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megatron.config.data import DataConfig
from megatron.convert.errors import ConversionError
from megatron.convert.json_files import read_json, write_json
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.data.tokenizer.huggingface import RustTokenizer

SAMPLE = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and dedicated to the "
    "proposition that all men are created equal. Now we are engaged in a great civil war, testing whether that nation, or any nation so "
    "conceived and so dedicated, can long endure. We are met on a great battle-field of that war.\n\n"
    "Wir sind's: 1,863 Menschen — naïve œuvres, 東京!\n"
)
"""Lincoln at Gettysburg, 1863, and some characters of other kinds: the text on which tokenizers and models are compared."""
CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
CARRIED = ("chat_template.jinja",)
"""Files that go along unchanged."""
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
KEPT = (*TOKENS, "additional_special_tokens", "extra_special_tokens", "chat_template", "model_max_length", "padding_side", "truncation_side")
"""Entries of tokenizer_config.json that go along, unless an export says otherwise itself."""
WITHOUT = "add --no_save_tokenizer to export the weights alone"


class SpecialTokens(NamedTuple):
    """Ids for config.json; None where there is no such token."""

    bos: int | None
    eos: int | None
    pad: int | None


def save_tokenizer(data: DataConfig, directory: Path) -> SpecialTokens:
    """Writes the tokenizer's files and compares what it reads in SAMPLE with ours. Raises TokenizerError, and ConversionError for one that
    Hugging Face has no form for."""
    ours = build_tokenizer(data)
    if data.tokenizer_type not in WRITERS:
        raise ConversionError(f"tokenizer_type {data.tokenizer_type} has no form of Hugging Face's: {WITHOUT}.")
    WRITERS[data.tokenizer_type](ours, data, directory)
    _keep_companions(data, directory)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if theirs.encode(SAMPLE, add_special_tokens=False) != without_added(ours, ours.encode(SAMPLE), theirs):
        raise ConversionError(f"the exported tokenizer reads a text otherwise than {data.tokenizer_type} here does: {WITHOUT}.")
    return SpecialTokens(theirs.bos_token_id, ours.eod, theirs.pad_token_id)


def without_added(ours: Tokenizer, ids: list[int], theirs: Any) -> list[int]:
    """`ids` without the special tokens that ours puts around every text by the template of its file."""
    around = ours.encode("")
    special = set(theirs.all_special_ids)
    while around and ids and ids[0] in special and ids[0] == around[0]:
        ids, around = ids[1:], around[1:]
    return ids[: len(ids) - len(around)] if around and ids[-len(around) :] == around else ids


def _keep_companions(data: DataConfig, directory: Path) -> None:
    """What lies beside our tokenizer's file and says how a model uses it: chat template, named tokens, sides."""
    if data.vocab_file is None:
        return
    given = Path(data.vocab_file)
    folder = given if given.is_dir() else given.parent
    for name in CARRIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, directory / name)
    settings, stored = read_json(directory / CONFIG), read_json(folder / CONFIG)
    write_json(directory / CONFIG, {**{key: stored[key] for key in KEPT if stored.get(key)}, **settings})


def kept_generation(data: DataConfig) -> dict[str, Any]:
    """How an imported model generates, from beside its tokenizer; empty where nothing says it."""
    given = Path(data.vocab_file or "")
    settings = read_json((given if given.is_dir() else given.parent) / GENERATION) if data.vocab_file else {}
    return {key: value for key, value in settings.items() if key != "transformers_version" and value is not None}


def _write_fast(ours: Tokenizer, data: DataConfig, directory: Path) -> None:
    """What the tokenizers library runs, with the settings that lie beside its file, if any."""
    assert isinstance(ours, RustTokenizer)
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if ours.eod is not None:
        settings["eos_token"] = ours._tokenizer.id_to_token(ours.eod)
    ours._tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / CONFIG, settings)


def _write_sentence_pieces(ours: Tokenizer, data: DataConfig, directory: Path) -> None:
    """A Llama tokenizer made from the SentencePiece model, which lies beside it."""
    from tokenizers import decoders, normalizers
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import LlamaConverter  # noqa: F401 -- what `from_pretrained` needs of the package `sentencepiece`

    shutil.copyfile(str(data.vocab_file), directory / "tokenizer.model")
    write_json(directory / CONFIG, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"})
    converted = LlamaTokenizer.from_pretrained(directory)
    converted.save_pretrained(directory)
    rules = converted.backend_tokenizer  # that class drops a first space and never joins spaces across words; the library does neither
    rules.model = _merging_by_score(ours)
    rules.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    rules.pre_tokenizer = None
    rules.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    rules.save(str(directory / "tokenizer.json"))
    write_json(directory / CONFIG, {**read_json(directory / CONFIG), "tokenizer_class": "PreTrainedTokenizerFast"})


def _merging_by_score(ours: Any) -> Any:
    """The pieces as a BPE that joins first what scores highest, as the library does."""
    from tokenizers import models

    processor = ours._processor
    pieces = {processor.id_to_piece(number): number for number in range(ours.vocab_size)}
    splits = [(piece[:place], piece[place:], number) for piece, number in pieces.items() for place in range(1, len(piece))]
    known = [(left, right, number) for left, right, number in splits if left in pieces and right in pieces]
    known.sort(key=lambda split: (-processor.get_score(split[2]), pieces[split[0]], pieces[split[1]]))
    merges = [(left, right) for left, right, _ in known]
    return models.BPE(vocab=pieces, merges=merges, unk_token=processor.id_to_piece(processor.unk_id()), fuse_unk=True, byte_fallback=True)


def _write_tiktoken(ours: Tokenizer, data: DataConfig, directory: Path) -> None:
    """Llama 3's ranks as a byte-level BPE."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from megatron.data.tokenizer.tiktoken_ranks import LLAMA3_PATTERN, LLAMA3_SPECIAL

    if not Path(str(data.vocab_file)).is_file():
        raise ConversionError(f"vocab_file {data.vocab_file}: only Llama 3's file can be written as Hugging Face's: {WITHOUT}.")
    special = ["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_special_token_{number}|>" for number in range(LLAMA3_SPECIAL - 2)]
    converted = TikTokenConverter(str(data.vocab_file), pattern=LLAMA3_PATTERN, extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted, bos_token=special[0], eos_token=special[1])
    tokenizer.save_pretrained(directory)


WRITERS: dict[str, Callable[[Tokenizer, DataConfig, Path], None]] = {
    "HFTokenizer": _write_fast,
    "GPT2BPETokenizer": _write_fast,
    "HFGPT2Tokenizer": _write_fast,
    "SPMTokenizer": _write_sentence_pieces,
    "TiktokenTokenizer": _write_tiktoken,
}
"""Our type -> how its files are written."""


def tokenizer_keys(directory: Path, target: Path) -> dict[str, str]:
    """Copies the tokenizer of a directory of Hugging Face's into `target` and returns the keys that name it; empty where there is none."""
    for name, kind in (("tokenizer.json", "HFTokenizer"), ("tokenizer.model", "SPMTokenizer")):
        if (directory / name).is_file():
            for file in (name, CONFIG, GENERATION, *CARRIED):
                if (directory / file).is_file():
                    shutil.copyfile(directory / file, target / file)
            return {"tokenizer_type": kind, "vocab_file": name}
    return {}
