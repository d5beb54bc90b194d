"""Text that tokenizers get wrong, and real text; and GPT-2's two files, whole."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

HARD = [
    "",
    " ",
    "  two before and two after  ",
    "\n\n  x\t\r\n",
    "a\n\n\nb\r\n\r\nc\u00a0d\u2003e",
    "Fellow-Citizens of the Senate, it's the 4th of July 1776; we'll've 3.14159 reasons",
    "naïve — ½ of 日本, Ελλάδα, Россия, العربية, हिन्दी, ไทย",
    "e\u0301 \u00e9 \u1100\u1161 ﬁ Å",
    "😀👩‍👩‍👧‍👦 🇪🇺 ☃\ufe0f \U0001f9d1\u200d\U0001f4bb",
    "def f(x):\n    if x:\n\treturn {'a': [1, 2, 300000]}  # nothing\n\n\n",
    "a\x00b\x07\x1b[0m \ufffd \ufeff \u200b\u2028",
    "=" * 200 + "-" * 77 + " " * 130 + "x" * 99,
    "<|endoftext|> </s> <s> <unk> [INST] <|padding|> <|eot_id|>",
    " <|endoftext|>\n",
    "\u2581a \u0120b \u010a",
]


def real_texts(shared_dir: Path) -> list[str]:
    """Parts of WikiText, web pages and exercises; skips where they are not."""
    folder = shared_dir / "data" / "text"
    texts = []
    for name in ("wikitext2_raw_valid.txt", "c4_exllamav3.txt", "gsm8k_test.jsonl", "tinystories_exllamav3.txt"):
        if not (folder / name).is_file():
            pytest.skip(f"no {folder / name}")
        text = (folder / name).read_text(encoding="utf-8")
        texts += [text[start : start + 20_000] for start in range(0, min(len(text), 200_000), 20_000)]
    return texts


def random_texts(seed: int, count: int) -> list[str]:
    """Short strings of every plane, white space and repetitions."""
    draw = random.Random(seed)
    alphabets = ["ab ", "aA1 \n'", " \n\t\r", "日本語 αβγ", "😀👩\u200d👧 é", "=-_*# ", "0123456789.,"]

    def character() -> str:
        return chr(draw.choice((draw.randrange(32, 0x300), draw.randrange(0x300, 0xD800), draw.randrange(0xE000, 0x20000), 10, 32)))

    def text() -> str:
        alphabet = draw.choice(alphabets)
        return "".join(draw.choice(alphabet) if draw.random() < 0.8 else character() for _ in range(draw.randrange(40)))

    return [text() for _ in range(count)]


def gpt2_files(shared_dir: Path, folder: Path) -> tuple[Path, Path]:
    """(vocab.json, merges.txt) in `folder`: the 256 bytes, one entry a merge in order, then <|endoftext|>; skips where there is no merges.txt."""
    source = shared_dir / "data" / "tokenizers" / "gpt2"
    if not (source / "merges.txt").is_file():
        pytest.skip(f"no {source / 'merges.txt'}")
    merges = (source / "merges.txt").read_text(encoding="utf-8")
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))]
    entries = [*symbols, *(line.replace(" ", "") for line in merges.splitlines()[1:] if line), "<|endoftext|>"]
    known = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    assert all(known[entry] == number for number, entry in enumerate(entries[:50255]))
    (folder / "vocab.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"
