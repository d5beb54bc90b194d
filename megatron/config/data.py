"""Where the tokens come from and which tokenizer made them."""

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
    """One corpus (the path without .bin/.idx), divided by `split`. None: the `*_data_paths` are used."""
    split: str = "969, 30, 1"
    """Shares of documents for training, validation and test. A part of `data_path` that gets no document is left out, with a notice."""
    train_data_paths: list[str] | None = None
    """Corpora to train on; all three `*_data_paths` or none. None: `data_path` is used."""
    valid_data_paths: list[str] | None = None
    """Corpora to validate on. None: `data_path` is used."""
    test_data_paths: list[str] | None = None
    """Corpora to test on. None: `data_path` is used."""
    train_label_data_paths: list[str] | None = None
    """What to predict: for each of `train_data_paths` a file with one label a token (the token itself, or -100 where the loss does not count),
    not shifted. None: every token counts."""
    valid_label_data_paths: list[str] | None = None
    """The same for `valid_data_paths`. None: every token counts."""
    test_label_data_paths: list[str] | None = None
    """The same for `test_data_paths`. None: every token counts."""
    train_data_weights: list[float] | None = None
    """Share of each training corpus. None: equal shares."""
    valid_data_weights: list[float] | None = None
    """Share of each validation corpus. None: equal shares."""
    test_data_weights: list[float] | None = None
    """Share of each test corpus. None: equal shares."""
    weight_by_num_documents: bool = False
    """Share of each of the `*_data_paths` by its number of documents, in place of given weights: p^alpha (1 - p), where p is the corpus' part of all
    documents."""
    weighted_sampler_alpha: NonNegativeFloat = 1.0
    """alpha in `weight_by_num_documents`: the smaller, the more often small corpora are read."""
    data_impl: Literal["infer", "mmap", "cached", "lazy"] = "infer"
    """Format on disk; infer and mmap both mean the memory-mapped .bin/.idx pair, the older ones are refused."""
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    """How documents become sequences of `seq_length`: end to end and cut (packed); whole ones, as many as fit (pack_until_overflow); one each
    (unpacked, needs labels). The last two fill up with padding that does not count in the loss."""
    allow_chopped: bool = True
    """Whether pack_until_overflow and unpacked use the beginning of documents longer than a sequence; false leaves such documents out."""
    reset_attention_mask: bool = False
    """Let no token attend to another document of its sequence."""
    reset_position_ids: bool = False
    """Let positions begin again at 0 with each document of a sequence."""
    tokenizer_type: Literal[
        "GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer", "NullTokenizer"
    ] = "GPT2BPETokenizer"
    """GPT2BPETokenizer reads vocab.json and merges.txt, HFTokenizer a tokenizer.json, HFGPT2Tokenizer a folder or a name on the Hugging Face hub,
    SPMTokenizer a SentencePiece model (Llama 2, Mistral), TiktokenTokenizer Llama 3's tokenizer.model or an encoding's name; CharLevelTokenizer uses
    bytes. NullTokenizer stands for data that is tokenized already and needs `vocab_size`; it reads no text."""
    vocab_file: str | None = None
    """The tokenizer's file, see `tokenizer_type`. None: for tokenizers without one."""
    merge_file: str | None = None
    """merges.txt of GPT2BPETokenizer. None: for the other tokenizers."""
    vocab_size: PositiveInt | None = None
    """Number of tokens, for NullTokenizer alone. None: the tokenizer says how many it has."""
    generation_config: str | None = None
    """Hugging Face's generation_config.json of the model: generate.py stops at each id of its `eos_token_id`, and exports carry it. None: the file of
    that name beside `vocab_file`, if there is one."""
    num_workers: NaturalInt = 2
    """Processes that load data ahead; 0 loads in the training process."""
    use_shared_fs: bool = True
    """Whether all machines see the same data folder: the first process works out the order of samples and all read it. False: one process on
    each machine does."""
    mmap_warmup: bool = False
    """Read the whole data file once before training."""
    eod_mask_loss: bool = False
    """Leave the token after an end-of-document out of the loss."""

    def check(self) -> Iterator[Problem]:
        paths = {f"{name}_data_paths": getattr(self, f"{name}_data_paths") for name in SUBSETS}
        given = [key for key, value in paths.items() if value is not None]
        if self.data_path is not None and given:
            yield Problem(("data_path", given[0]), f"give either it or the *_data_paths, not both ({given[0]} is given)")
        elif given and len(given) < len(SUBSETS):
            missing = ", ".join(key for key in paths if key not in given)
            yield Problem((given[0],), f"needs the other *_data_paths as well; missing: {missing}")
        if (self.tokenizer_type == "NullTokenizer") != (self.vocab_size is not None):
            yield Problem(("tokenizer_type", "vocab_size"), "NullTokenizer needs vocab_size, and no other tokenizer takes it: they know their size")
        for name in SUBSETS:
            yield from self._weight_problems(name)
        yield from self._label_problems()
        yield from self._split_problems()
        yield from self._path_problems()
        if self.data_impl in ("cached", "lazy"):
            message = "is a format from before the memory-mapped one and is not read; prepare the text again and write mmap, or leave the key out"
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
            yield Problem((key,), "must be 0 or more each, and not all 0")

    def _label_problems(self) -> Iterator[Problem]:
        labels = {name: getattr(self, f"{name}_label_data_paths") for name in SUBSETS}
        given = [f"{name}_label_data_paths" for name in SUBSETS if labels[name] is not None]
        if not given:
            if self.pack_impl == "unpacked":
                yield Problem(("pack_impl",), "needs train_label_data_paths, valid_label_data_paths and test_label_data_paths")
            return
        if self.train_data_paths is None or self.valid_data_paths is None or self.test_data_paths is None:
            yield Problem((given[0],), "needs train_data_paths, valid_data_paths and test_data_paths: each labels one of their files")
            return
        if len(given) < len(SUBSETS):
            missing = ", ".join(f"{name}_label_data_paths" for name in SUBSETS if labels[name] is None)
            yield Problem((given[0],), f"needs the other *_label_data_paths as well, so that all losses count the same tokens; missing: {missing}")
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
        """What is no path of one corpus: a list of several, as Megatron-LM and others take it under one key."""
        if self.data_path is not None:
            yield from self._several_under_data_path(self.data_path)
        for key in (f"{name}_data_paths" for name in SUBSETS):
            for path in getattr(self, key) or []:
                if NUMBER.fullmatch(path) and not Path(f"{path}.idx").is_file():
                    yield Problem((key,), f"holds the number {path} and takes paths alone; weights go to {key.replace('paths', 'weights')}")
                elif "," in path and not Path(f"{path}.idx").is_file():
                    names = ", ".join(part.strip() for part in path.split(",") if part.strip())
                    yield Problem((key,), f"'{path}' names one corpus; for several write an entry each: [{names}]")

    def _several_under_data_path(self, path: str) -> Iterator[Problem]:
        if Path(f"{path}.idx").is_file():
            return
        words = [word for word in re.split(r"[,\s]+", path) if word]
        weights = [word for word in words if NUMBER.fullmatch(word)]
        names = [word for word in words if not NUMBER.fullmatch(word)]
        if len(names) < 2 or not ("," in path or len(weights) == len(names)):
            return
        given = f"train_data_paths: [{', '.join(names)}]" + (f" and train_data_weights: [{', '.join(weights)}]" if weights else "")
        yield Problem(("data_path",), f"names one corpus; for several write {given} (and valid_data_paths and test_data_paths)")
