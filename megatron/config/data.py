"""Where the tokens come from and which tokenizer made them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from megatron.config.section import NaturalInt, Problem, Section

SUBSETS = ("train", "valid", "test")


class DataConfig(Section):
    data_path: str | None = None
    """One corpus (the path without .bin/.idx), divided by `split`. None: the `*_data_paths` are used."""
    split: str = "969, 30, 1"
    """Shares of documents for training, validation and test."""
    train_data_paths: list[str] | None = None
    """Corpora to train on; all three `*_data_paths` or none. None: `data_path` is used."""
    valid_data_paths: list[str] | None = None
    """Corpora to validate on. None: `data_path` is used."""
    test_data_paths: list[str] | None = None
    """Corpora to test on. None: `data_path` is used."""
    train_data_weights: list[float] | None = None
    """Share of each training corpus. None: equal shares."""
    valid_data_weights: list[float] | None = None
    """Share of each validation corpus. None: equal shares."""
    test_data_weights: list[float] | None = None
    """Share of each test corpus. None: equal shares."""
    data_impl: Literal["infer", "mmap"] = "infer"
    """Format on disk; both mean the memory-mapped .bin/.idx pair."""
    pack_impl: Literal["packed"] = "packed"
    """How documents become sequences: end to end, cut at `seq_length`."""
    tokenizer_type: Literal["GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer"] = (
        "GPT2BPETokenizer"
    )
    """GPT2BPETokenizer reads vocab.json and merges.txt, HFTokenizer a tokenizer.json, HFGPT2Tokenizer a folder or a name on the Hugging Face hub,
    SPMTokenizer a SentencePiece model (Llama 2, Mistral), TiktokenTokenizer Llama 3's tokenizer.model or an encoding's name; CharLevelTokenizer uses
    bytes."""
    vocab_file: str | None = None
    """The tokenizer's file, see `tokenizer_type`. None: for tokenizers without one."""
    merge_file: str | None = None
    """merges.txt of GPT2BPETokenizer. None: for the other tokenizers."""
    num_workers: NaturalInt = 2
    """Processes that load data ahead; 0 loads in the training process."""
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
        for name in SUBSETS:
            yield from self._weight_problems(name)
        yield from self._split_problems()

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

    def _split_problems(self) -> Iterator[Problem]:
        try:
            shares = [float(part) for part in self.split.replace("/", ",").split(",") if part.strip()]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) <= 0:
            yield Problem(("split",), "must be up to three numbers, 0 or more and not all 0, such as '969, 30, 1'")
