"""A SentencePiece model as a tokenizer.json of the tokenizers library.

The file of a SentencePiece model is a message of Protocol Buffers. The few fields that are needed are read here, so that neither the package protobuf
nor transformers' converters, which ask for it, are needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron.convert.errors import ConversionError

SPACE = "\u2581"
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4
"""TrainerSpec.ModelType."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""ModelProto.SentencePiece.Type."""


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place. `kind`: NORMAL, UNKNOWN, ..."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class PieceModel:
    """What a model's file says. `charsmap`: SentencePiece's compiled rules of normalisation, empty for none."""

    pieces: tuple[Piece, ...]
    kind: int
    charsmap: bytes
    dummy_prefix: bool
    """A space is put before every text."""
    single_spaces: bool
    """Spaces around a text are removed, several in a row become one."""
    plain: bool
    """False: white space ends words, or is not replaced. Only some models for other programs do that."""

    def named(self, kind: int) -> list[str]:
        """The texts of the pieces of a kind."""
        return [piece.text for piece in self.pieces if piece.kind == kind]


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a Protocol Buffers message, in order: whole numbers, floats, or bytes. Raises ValueError for anything else."""
    place = 0

    def varint() -> int:
        nonlocal place
        number, shift = 0, 0
        while True:
            byte = message[place]
            place += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while place < len(message):
        key = varint()
        value: Any
        match key & 7:
            case 0:
                value = varint()
            case 2:
                size = varint()
                value, place = message[place : place + size], place + size
            case 5:
                value, place = struct.unpack_from("<f", message, place)[0], place + 4
            case 1:
                value, place = struct.unpack_from("<d", message, place)[0], place + 8
            case kind:
                raise ValueError(f"a field of the unknown wire type {kind}")
        yield key >> 3, value


def read_piece_model(path: Path) -> PieceModel:
    """The fields of sentencepiece_model.proto that decide how text is cut. Raises ConversionError for a damaged file."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                entry = dict(fields(value))
                pieces.append(Piece(entry[1].decode(), float(entry.get(2, 0.0)), int(entry.get(3, NORMAL))))
            elif number == 2:
                trainer = dict(fields(value))
            elif number == 3:
                normalizer = dict(fields(value))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ConversionError(f"{path} is not a SentencePiece model, or is damaged ({error}).") from error
    return PieceModel(
        tuple(pieces),
        kind=int(trainer.get(3, UNIGRAM)),
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, True)),
        single_spaces=bool(normalizer.get(4, True)),
        plain=bool(normalizer.get(5, True)) and not trainer.get(24, False),
    )


def as_tokenizer(model: PieceModel, name: str) -> Any:
    """A `tokenizers.Tokenizer` that cuts text as the library sentencepiece does. `name` is for messages.

    Raises ConversionError for a model whose rules it has no form for.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    if not model.plain or model.kind == WORD:
        rule = "it cuts at words" if model.kind == WORD else "white space ends its words or is not replaced"
        raise ConversionError(f"{name} cannot be written for the tokenizers library: {rule}.")
    tokenizer = Tokenizer(_model(model))
    rules: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.single_spaces:
        rules += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    rules += [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*rules, normalizers.Replace(" ", SPACE)])
    if symbols := sorted(model.named(USER_DEFINED), key=len, reverse=True):
        pattern = "|".join("".join(f"\\x{{{ord(letter):X}}}" for letter in symbol) for symbol in symbols)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [*model.named(UNKNOWN), *model.named(CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def _model(model: PieceModel) -> Any:
    """The pieces: a Unigram as it is, a BPE with the merges that its scores order."""
    from tokenizers import models

    unknown = next((number for number, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    has_bytes = any(piece.kind == BYTE for piece in model.pieces)
    if model.kind == UNIGRAM:
        return models.Unigram([(piece.text, piece.score) for piece in model.pieces], unk_id=unknown, byte_fallback=has_bytes)
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    return models.BPE(
        vocab=ids,
        merges=[] if model.kind == CHAR else _merges(model, ids),
        unk_token=None if unknown is None else model.pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=has_bytes,
        ignore_merges=bool(model.named(USER_DEFINED)),
    )


def _merges(model: PieceModel, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the highest score first, as the library joins them."""
    usable = {piece.text: (piece.score, number) for number, piece in enumerate(model.pieces) if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    splits = [
        (-model.pieces[number].score, ids[text[:place]], ids[text[place:]], text[:place], text[place:])
        for text, (_, number) in usable.items()
        if model.pieces[number].kind == NORMAL
        for place in range(1, len(text))
        if text[:place] in usable and text[place:] in usable
    ]
    return [(left, right) for *_, left, right in sorted(splits)]
