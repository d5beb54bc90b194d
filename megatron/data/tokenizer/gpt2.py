"""GPT-2's byte-level BPE from its own files: `vocab.json` and `merges.txt`, or a Hugging Face folder or name."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron.data.tokenizer import TokenizerError
from megatron.data.tokenizer.huggingface import RustTokenizer, read_tokenizer_json

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MOST_MISSING = 1e-3
"""Up to this share of the merges may make a token that vocab.json does not have: GPT-NeoX reads such files too."""
FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


class GPT2BPETokenizer(RustTokenizer):
    """As in NeoX, text that spells `<|endoftext|>` stays text and never becomes the special token. Raises TokenizerError."""

    def __init__(self, vocab_file: str | Path | None, merge_file: str | Path | None) -> None:
        for key, value, name in (("vocab_file", vocab_file, "vocab.json"), ("merge_file", merge_file, "merges.txt")):
            if value is None:
                raise TokenizerError(
                    f"tokenizer_type GPT2BPETokenizer needs {key}: the path of GPT-2's {name}; a tokenizer.json is read by HFTokenizer"
                )
            if not Path(value).is_file():
                raise TokenizerError(f"{key}: no file {value}; give the path of GPT-2's {name}")
        super().__init__(read_gpt2(Path(str(vocab_file)), Path(str(merge_file))), Path(str(vocab_file)).parent)

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([token for token in ids if token != self.eod])


class HFGPT2Tokenizer(RustTokenizer):
    """GPT-2's tokenizer as Hugging Face has it, with NeoX's `<|padding|>` added. Text that spells a special token becomes that token.

    `vocab_file` is a folder with a tokenizer.json, or with vocab.json and merges.txt, or the name of such a folder on the Hugging Face hub. A name
    is searched among earlier downloads, then downloaded. None stands for `gpt2`, which is never downloaded. Raises TokenizerError.
    """

    def __init__(self, vocab_file: str | Path | None, merge_file: str | Path | None = None) -> None:
        folder = Path(vocab_file) if vocab_file is not None and Path(vocab_file).exists() else fetch(vocab_file)
        tokenizer = read_folder(folder)
        tokenizer.add_special_tokens([PADDING])
        super().__init__(tokenizer, folder)


def read_gpt2(vocab: Path, merges: Path) -> Tokenizer:
    """A byte-level BPE without special tokens. If a few merges make tokens that do not exist, they are left out with a warning. Raises
    TokenizerError."""
    try:
        tokenizer = Tokenizer(_model(vocab, merges))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            f"{vocab} and {merges} are not GPT-2's vocab.json (entry: id) and merges.txt (a pair a line): {error}{hint_for(vocab)}"
        ) from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _model(vocab: Path, merges: Path) -> models.BPE:
    """Raises whatever the library raises."""
    ids, pairs = models.BPE.read_file(str(vocab), str(merges))
    usable = [pair for pair in pairs if ids.keys() >= {*pair, "".join(pair)}]
    missing = len(pairs) - len(usable)
    if not 0 < missing <= MOST_MISSING * len(pairs):
        return models.BPE(ids, pairs)
    first = next("".join(pair) for pair, kept in zip(pairs, [*usable, None], strict=False) if pair != kept)
    log.warning(
        "%d of the %s merges in %s make a token that %s does not have (%s). These merges are left out.",
        missing,
        f"{len(pairs):,}",
        merges,
        vocab.name,
        first,
    )
    return models.BPE(ids, usable)


def hint_for(vocab: Path) -> str:
    try:
        content = json.loads(vocab.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    whole = isinstance(content, dict) and isinstance(content.get("model"), dict)
    return ". It is a tokenizer.json: tokenizer_type HFTokenizer reads it" if whole else ""


def read_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer_json(folder / "tokenizer.json")
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        raise TokenizerError(
            f"vocab_file: {folder} is not a folder with a tokenizer.json, or with vocab.json and merges.txt. HFGPT2Tokenizer takes such a "
            "folder or a name on the Hugging Face hub; HFTokenizer takes the path of a tokenizer.json"
        )
    tokenizer = read_gpt2(vocab, merges)
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return tokenizer


def fetch(vocab_file: str | Path | None) -> Path:
    """The folder that holds the files of a name on the hub. Raises TokenizerError."""
    name = "gpt2" if vocab_file is None else str(vocab_file)
    if name.startswith((".", "/", "~")) or name.endswith((".json", ".txt")) or name.count("/") > 1:
        raise TokenizerError(f"vocab_file: no folder {name}; HFGPT2Tokenizer takes a folder or a name on the Hugging Face hub")
    found = lookup(name, local_files_only=True)
    if found is None and vocab_file is not None:
        found = lookup(name, local_files_only=False)
    if found is not None:
        return found
    if vocab_file is None:
        raise TokenizerError(
            "tokenizer_type HFGPT2Tokenizer without vocab_file means `gpt2` of the Hugging Face hub, which has not been downloaded. Give a folder "
            "with its files, or write vocab_file: gpt2 to download it"
        )
    raise TokenizerError(
        f"vocab_file: there is no folder {name}. It was not downloaded before, and the Hugging Face hub does not give it now "
        "(no network, HF_HUB_OFFLINE, or no such name). Give a folder with a tokenizer.json, or with vocab.json and merges.txt"
    )


def lookup(name: str, *, local_files_only: bool) -> Path | None:
    """None: it cannot be found."""
    from huggingface_hub import hf_hub_download

    for files in FILES:
        try:
            paths = [hf_hub_download(name, file, local_files_only=local_files_only) for file in files]
            return Path(paths[0]).parent
        except (OSError, ValueError):  # not found, no network, no access: the hub's errors are all of these kinds
            continue
    return None
