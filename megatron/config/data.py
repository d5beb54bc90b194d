"""The training, validation and test data, and the tokenizer that made their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron.config.section import NaturalInt, NonNegativeFloat, PositiveInt, Problem, Section
from megatron.config.split import parse_split

SUBSETS = ("train", "valid", "test")
NUMBER = re.compile(r"[0-9]*\.?[0-9]+")


class DataConfig(Section):
    data_path: str | None = None
    """Path of one corpus, without .bin or .idx. `split` divides it into training, validation and test data. None: the `*_data_paths` are used."""
    split: str = "969, 30, 1"
    """Shares of the documents of `data_path` for training, validation and test. A part without documents is left out, and a notice says so."""
    train_data_paths: list[str] | None = None
    """Corpora to train on. Give all three `*_data_paths` or none of them. None: `data_path` is used."""
    valid_data_paths: list[str] | None = None
    """Corpora to validate on. None: `data_path` is used."""
    test_data_paths: list[str] | None = None
    """Corpora to test on. None: `data_path` is used."""
    train_label_data_paths: list[str] | None = None
    """Files with labels: one file for each of `train_data_paths`, with one label for each token. The label is the token itself, or -100 where the
    token does not count in the loss. Labels are not shifted. None: every token counts."""
    valid_label_data_paths: list[str] | None = None
    """Files with labels for `valid_data_paths`, as in `train_label_data_paths`. None: every token counts."""
    test_label_data_paths: list[str] | None = None
    """Files with labels for `test_data_paths`, as in `train_label_data_paths`. None: every token counts."""
    train_data_weights: list[float] | None = None
    """Share of each training corpus. None: equal shares."""
    valid_data_weights: list[float] | None = None
    """Share of each validation corpus. None: equal shares."""
    test_data_weights: list[float] | None = None
    """Share of each test corpus. None: equal shares."""
    weight_by_num_documents: bool = False
    """Compute the share of each of the `*_data_paths` from its number of documents, instead of given weights. The shares are in proportion to
    p^alpha (1 - p), where p is the corpus' part of all documents."""
    weighted_sampler_alpha: NonNegativeFloat = 1.0
    """The alpha in `weight_by_num_documents`. A smaller alpha means that small corpora are read more often."""
    data_impl: Literal["infer", "mmap", "cached", "lazy"] = "infer"
    """Format of the corpus on disk. infer and mmap: the memory-mapped pair of .bin and .idx. cached and lazy are older formats and are refused."""
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    """How documents become sequences of `seq_length` tokens. packed: documents are joined end to end and then cut. pack_until_overflow: each
    sequence has as many whole documents as fit. unpacked: each sequence has one document; this needs labels. The last two fill sequences up with
    padding, and padding does not count in the loss."""
    allow_chopped: bool = True
    """What pack_until_overflow and unpacked do with a document longer than a sequence. True: its beginning is used. False: the document is left
    out."""
    reset_attention_mask: bool = False
    """True: a token does not attend to other documents in its sequence."""
    reset_position_ids: bool = False
    """True: positions start again at 0 with each document in a sequence."""
    tokenizer_type: Literal[
        "GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer", "NullTokenizer"
    ] = "GPT2BPETokenizer"
    """Kind of tokenizer. GPT2BPETokenizer: vocab.json and merges.txt. HFTokenizer: tokenizer.json. HFGPT2Tokenizer: a folder, or a name on the
    Hugging Face hub. SPMTokenizer: a SentencePiece model (Llama 2, Mistral). TiktokenTokenizer: Llama 3's tokenizer.model, or the name of an
    encoding. CharLevelTokenizer: bytes. NullTokenizer: for data that is tokenized already; it needs `vocab_size` and cannot read text."""
    vocab_file: str | None = None
    """File of the tokenizer, see `tokenizer_type`. None: for tokenizers without a file."""
    merge_file: str | None = None
    """The file merges.txt of GPT2BPETokenizer. None: for the other tokenizers."""
    vocab_size: PositiveInt | None = None
    """Number of tokens; only for NullTokenizer. None: the tokenizer knows its number of tokens."""
    generation_config: str | None = None
    """Path of the model's generation_config.json (Hugging Face). generate.py stops at each of its `eos_token_id`, and exports contain the file.
    None: generation_config.json beside `vocab_file`, if it exists."""
    num_workers: NaturalInt = 2
    """Number of processes that load data in advance. 0: the training process loads its own data."""
    use_shared_fs: bool = True
    """True: all machines see the same data folder. The first process computes the order of the samples, and all processes read it. False: one
    process on each machine computes it."""
    mmap_warmup: bool = False
    """Read the whole data file once before training."""
    eod_mask_loss: bool = False
    """Leave the token after an end-of-document token out of the loss."""

    def check(self) -> Iterator[Problem]:
        paths = {f"{name}_data_paths": getattr(self, f"{name}_data_paths") for name in SUBSETS}
        given = [key for key, value in paths.items() if value is not None]
        if self.data_path is not None and given:
            yield Problem(("data_path", given[0]), f"give either it or the *_data_paths, not both ({given[0]} is given)")
        elif given and len(given) < len(SUBSETS):
            missing = ", ".join(key for key in paths if key not in given)
            yield Problem((given[0],), f"needs the other *_data_paths too; missing: {missing}")
        if (self.tokenizer_type == "NullTokenizer") != (self.vocab_size is not None):
            yield Problem(
                ("tokenizer_type", "vocab_size"), "only NullTokenizer takes vocab_size, and it needs it; other tokenizers know their number of tokens"
            )
        for name in SUBSETS:
            yield from self._weight_problems(name)
        yield from self._label_problems()
        yield from self._split_problems()
        yield from self._path_problems()
        if self.data_impl in ("cached", "lazy"):
            message = "is an older format, which this version cannot read; prepare the text again and write data_impl: mmap, or remove the key"
            yield Problem(("data_impl",), message)

    def _weight_problems(self, name: str) -> Iterator[Problem]:
        paths, weights = getattr(self, f"{name}_data_paths"), getattr(self, f"{name}_data_weights")
        key = f"{name}_data_weights"
        if paths is not None and not paths:
            yield Problem((f"{name}_data_paths",), "must name at least one corpus")
        if weights is None:
            return
        if len(weights) != len(paths or []):
            yield Problem((key, f"{name}_data_paths"), f"must have one weight for each of the {len(paths or [])} {name}_data_paths")
        if any(weight < 0 for weight in weights) or sum(weights) <= 0:
            yield Problem((key,), "must be numbers of 0 or more, and at least one must be above 0")

    def _label_problems(self) -> Iterator[Problem]:
        labels = {name: getattr(self, f"{name}_label_data_paths") for name in SUBSETS}
        given = [f"{name}_label_data_paths" for name in SUBSETS if labels[name] is not None]
        if not given:
            if self.pack_impl == "unpacked":
                yield Problem(("pack_impl",), "needs train_label_data_paths, valid_label_data_paths and test_label_data_paths")
            return
        if self.train_data_paths is None or self.valid_data_paths is None or self.test_data_paths is None:
            yield Problem(
                (given[0],), "needs train_data_paths, valid_data_paths and test_data_paths, because each label file belongs to one of their files"
            )
            return
        if len(given) < len(SUBSETS):
            missing = ", ".join(f"{name}_label_data_paths" for name in SUBSETS if labels[name] is None)
            yield Problem((given[0],), f"needs the other *_label_data_paths too, because all losses must count the same tokens; missing: {missing}")
        for name in SUBSETS:
            key, paths = f"{name}_label_data_paths", getattr(self, f"{name}_data_paths")
            if labels[name] is not None and len(labels[name]) != len(paths):
                yield Problem((key, f"{name}_data_paths"), f"must name one file for each of the {len(paths)} {name}_data_paths")

    def _split_problems(self) -> Iterator[Problem]:
        try:
            parse_split(self.split)
        except ValueError as error:
            yield Problem(("split",), str(error))

    def _path_problems(self) -> Iterator[Problem]:
        """Values that are not the path of one corpus: for example a list of several under one key, as Megatron-LM writes it."""
        if self.data_path is not None:
            yield from self._several_under_data_path(self.data_path)
        for key in (f"{name}_data_paths" for name in SUBSETS):
            for path in getattr(self, key) or []:
                if NUMBER.fullmatch(path) and not Path(f"{path}.idx").is_file():
                    yield Problem((key,), f"holds the number {path} but takes paths only; write weights in {key.replace('paths', 'weights')}")
                elif "," in path and not Path(f"{path}.idx").is_file():
                    names = ", ".join(part.strip() for part in path.split(",") if part.strip())
                    yield Problem((key,), f"'{path}' names one corpus; write one entry for each corpus: [{names}]")

    def _several_under_data_path(self, path: str) -> Iterator[Problem]:
        if Path(f"{path}.idx").is_file():
            return
        words = [word for word in re.split(r"[,\s]+", path) if word]
        weights = [word for word in words if NUMBER.fullmatch(word)]
        names = [word for word in words if not NUMBER.fullmatch(word)]
        if len(names) < 2 or not ("," in path or len(weights) == len(names)):
            return
        given = f"train_data_paths: [{', '.join(names)}]" + (f" and train_data_weights: [{', '.join(weights)}]" if weights else "")
        yield Problem(("data_path",), f"names one corpus; for several corpora write {given}, and valid_data_paths and test_data_paths too")
