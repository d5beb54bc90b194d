"""Training a byte-level BPE vocabulary: every text can be encoded, nothing is normalised, decoding gives the text back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron.data.indexed import DatasetError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> int:
    """Writes a tokenizer.json with `<|endoftext|>` as id 0, the 256 bytes and the most frequent merges. Returns its size.

    The size is smaller than `vocab_size` when the texts have no more pairs to merge. The same texts give the same file.
    Raises DatasetError when `vocab_size` does not hold the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise DatasetError(f"--vocab-size {vocab_size}: give at least {SMALLEST_VOCABULARY}, for 256 bytes and {END_OF_TEXT}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    size: int = tokenizer.get_vocab_size()
    return size
