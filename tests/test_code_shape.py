"""The rules of CONTRIBUTING.md that a machine can hold: lengths, forbidden constructs, and which layer imports which.

`breaches(root)` is the guard; the first test runs it on this repository, the others prove on small wrong programs that each rule can fail.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron"
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6

# Code that is copied into exports: transformers calls its `forward` with names of its own, however many.
CALLED_BY_TRANSFORMERS = Path(PACKAGE, "convert", "huggingface")

# A module imports only from its own layer and from layers above it in this list; layers in one set do not import each other.
LAYERS: list[set[str]] = [
    {"config"},
    {"kernels"},
    {"mpu"},
    {"model"},
    {"data"},
    {"checkpoint"},
    {"monitor"},
    {"training"},
    {"inference", "convert"},
    {"analysis"},
    {"script"},
    {"launcher"},
    {"neox_arguments"},
    {"testing"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# `testing` stands beside training: it uses what is left of it and is used by nothing in the library.
LAST_RANK_SEEN_BY = {"testing": RANK["monitor"]}
# Third-party packages that a layer stays free of, however deep inside a function.
FORBIDDEN_PACKAGES = {
    "config": {"torch", "deepspeed", "numpy", "transformers", "tokenizers", "sentencepiece", "matplotlib", "pandas", "safetensors"},
    "kernels": {"deepspeed", "transformers"},
    "mpu": {"transformers"},
    "model": {"transformers", "matplotlib"},
}
FORBIDDEN_CALLS = {"print", "exit", "quit", "sys.exit", "eval", "exec", "breakpoint", "input"}
# An operator's schema is flat: what PyTorch calls, or a GPU starts, cannot have its tensors grouped.
OPERATOR_DECORATOR = re.compile(r"custom_op|torch_operator|register_(fake|kernel|autograd)|triton\.jit")
# Names that say where something was put instead of what it is.
EMPTY_NAMES = re.compile(r"^(utils?|misc|helpers?|common|stuff|new_.*|.*_v\d|.*_new|.*_old)$")
METHODS_MISTAKEN_FOR_FLAGS = {"eval", "train", "parameters", "is_initialized"}
# Comments that belong in an issue tracker, and remarks about how the code came to be: entries of a tracker, machines of one network, and paths of one
# machine. A path from the root may only lead into a folder that every system has, into one whose name says that it
# is not there, or into OpenAI's API.
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
TRACKER = re.compile(r"\bissues? #?\d|\bin this (issue|session)\b|/(issues|pull|merge_requests)/\d", re.IGNORECASE)
MACHINE = re.compile(r"\b[\w-]+\.(internal|intranet|intra|corp|lan)\b", re.IGNORECASE)
KNOWN_FOLDERS = ("bin", "dev", "etc", "opt", "proc", "sys", "usr", "var", "path/to", "nowhere", "no/such", "job/hostfile", "home/neox", "v1")
PATH_OF_A_MACHINE = re.compile(rf"(?<![\w.:/~*}}\])$%<>\\-])/(?!({'|'.join(KNOWN_FOLDERS)})\b)[A-Za-z]\w*/[\w{{]")
OUTSIDE_REFERENCES = (TRACKER, MACHINE, PATH_OF_A_MACHINE)
TEXTS = ("*.md", "Makefile", "Dockerfile", "docs/*.md", "configs/**/*.md", "configs/**/*.yml", "requirements/*", "csrc/*.md")


def breaches(root: Path) -> Iterator[str]:
    """Every breach of the rules in the checkout at `root`, as `file:line: what`."""
    for path in python_files(root):
        source = path.read_text(encoding="utf-8")
        where = path.relative_to(root)
        in_library = where.parts[0] == PACKAGE
        nodes = list(ast.walk(ast.parse(source, str(path))))
        calls_by_name = CALLED_BY_TRANSFORMERS in where.parents
        found = [*length_problems(nodes, source, unlimited="forward" if calls_by_name else None), *comment_problems(source)]
        if in_library:
            found += [(node.lineno, problem) for node in nodes for problem in construct_problems(node)]
            found += layer_problems(nodes, where)
        yield from (f"{where}:{line}: {problem}" for line, problem in sorted(found))
        if EMPTY_NAMES.match(path.stem):
            yield f"{where}: the file name says nothing about what is inside"
    for path in sorted(path for pattern in TEXTS for path in root.glob(pattern) if path.is_file()):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield from (f"{path.relative_to(root)}:{number}: {problem}" for problem in reference_problems(line))


def python_files(root: Path) -> list[Path]:
    scripts = sorted(root.glob("*.py"))
    return scripts + sorted(path for folder in (PACKAGE, "tools", "tests") for path in (root / folder).rglob("*.py"))


# ---------------------------------------------------------------- lengths


def length_problems(nodes: Sequence[ast.AST], source: str, unlimited: str | None = None) -> Iterator[tuple[int, str]]:
    """`unlimited` names functions that may take any number of parameters; None: there are none."""
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        yield 1, f"the file has {lines} lines (limit {MAX_FILE_LINES})"
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield node.lineno, f"{node.name}() has {length} lines (limit {MAX_FUNCTION_LINES})"
        if any(OPERATOR_DECORATOR.search(ast.unparse(decorator)) for decorator in node.decorator_list):
            continue
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MAX_PARAMETERS and node.name != unlimited:
            yield node.lineno, f"{node.name}() takes {count} parameters (limit {MAX_PARAMETERS}); group them"


def comment_problems(source: str) -> Iterator[tuple[int, str]]:
    """In comments and texts, docstrings included."""
    if not any(pattern.search(source) for pattern in (UNFINISHED, *OUTSIDE_REFERENCES)):
        return  # where the file has none, none of its parts has one, and taking it apart is slow
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (match := UNFINISHED.search(token.string)):
            yield token.start[0], f"{match.group()} in a comment: do it or file it"
        if token.type in TEXT_TOKENS:
            yield from ((token.start[0], problem) for problem in reference_problems(token.string))


TEXT_TOKENS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
"""From Python 3.12 on, an f-string is several tokens."""


def reference_problems(text: str) -> Iterator[str]:
    """What in a text points out of the repository."""
    for pattern in OUTSIDE_REFERENCES:
        if match := pattern.search(text):
            yield f"{match.group()!r} means nothing to a reader of the code"


# ---------------------------------------------------------------- constructs


def construct_problems(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Assert) and isinstance(node.test, ast.Tuple):
        yield "assert on a tuple is always true"
    elif isinstance(node, ast.ExceptHandler):
        if node.type is None:
            yield "bare except"
        elif ast.unparse(node.type) in {"Exception", "BaseException"} and all(isinstance(statement, ast.Pass) for statement in node.body):
            yield f"except {ast.unparse(node.type)}: pass hides every error"
    elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
        yield "star import"
    elif isinstance(node, ast.Global):
        yield f"module-level mutable state ({', '.join(node.names)})"
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
        yield f"{ast.unparse(node.func)}() in library code"
    elif isinstance(node, ast.If | ast.While | ast.IfExp) and (method := method_as_condition(node.test)):
        yield f"`{method}` tests a method, not its result: always true"


def method_as_condition(test: ast.expr) -> str | None:
    """`if not self.eval`: nn.Module's `eval` and `train` are methods, the flag is `self.training`."""
    test = test.operand if isinstance(test, ast.UnaryOp) else test
    return ast.unparse(test) if isinstance(test, ast.Attribute) and test.attr in METHODS_MISTAKEN_FOR_FLAGS else None


# ---------------------------------------------------------------- layers


def layer_problems(nodes: Sequence[ast.AST], where: Path) -> Iterator[tuple[int, str]]:
    if len(where.parts) < 2 or where.parts[1] == "__init__.py":
        yield from ((line, f"{where} imports {module}: importing the package must cost nothing") for line, module in imported_modules(nodes, where))
        return
    layer = where.parts[1].removesuffix(".py")
    if layer not in RANK:
        yield 1, f"'{layer}' is in no layer: give it a place in LAYERS"
        return
    last_rank = LAST_RANK_SEEN_BY.get(layer, RANK[layer] - 1)
    for line, module in imported_modules(nodes, where):
        top, *rest = module.split(".")
        if top in FORBIDDEN_PACKAGES.get(layer, ()):
            yield line, f"layer '{layer}' imports {top}"
        target = rest[0] if top == PACKAGE and rest else layer
        if target in RANK and target != layer and RANK[target] > last_rank:
            yield line, f"layer '{layer}' imports '{target}', which is not to its left"


def imported_modules(nodes: Sequence[ast.AST], where: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, inside functions too; relative imports and `from megatron import x` are spelled out."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            base = ".".join([*where.parts[: len(where.parts) - node.level], *filter(None, [node.module])]) if node.level else node.module
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


# ---------------------------------------------------------------- the tests


def test_the_repository_keeps_the_rules() -> None:
    found = list(breaches(ROOT))
    assert not found, f"{len(found)} breach(es):\n" + "\n".join(found)


def test_every_definition_of_the_library_is_used() -> None:
    """A class that nothing builds and a function that nothing calls go. Tests count: a plain definition may be there to be compared with."""
    files = [*python_files(ROOT), *ROOT.glob("*.md"), *(ROOT / "configs").rglob("*.yml")]
    uses = Counter(word for path in files for word in re.findall(r"\w+", path.read_text(encoding="utf-8")))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    unused = [
        f"{path.relative_to(ROOT)}:{node.lineno}: nothing uses {node.name}"
        for path in python_files(ROOT)
        if path.is_relative_to(ROOT / PACKAGE)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, definitions) and not node.decorator_list and uses[node.name] < 2
    ]
    assert not unused, "\n".join(unused)


SIX = "a, b, c, d, e, f"
WRONG_PROGRAMS = [
    ("megatron/model/long.py", "x = 1\n" * MAX_FILE_LINES, "the file has 501 lines (limit 500)"),
    ("megatron/model/long.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "f() has 61 lines (limit 60)"),
    ("megatron/model/wide.py", f"def f({SIX}, *, g): ...", "f() takes 7 parameters (limit 6); group them"),
    ("megatron/model/wide.py", f"class C:\n    def f(self, {SIX}, g): ...", "f() takes 7 parameters (limit 6); group them"),
    ("tests/test_long.py", "def test_f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "test_f() has 61 lines (limit 60)"),
    ("megatron/convert/huggingface/a.py", f"def f({SIX}, g): ...", "f() takes 7 parameters (limit 6); group them"),
    ("megatron/model/a.py", "print(1)", "print() in library code"),
    ("megatron/model/a.py", "import sys\nsys.exit(1)", "sys.exit() in library code"),
    ("megatron/model/a.py", "eval('1')", "eval() in library code"),
    ("megatron/model/a.py", "try:\n    x = 1\nexcept:\n    x = 2", "bare except"),
    ("megatron/model/a.py", "try:\n    x = 1\nexcept Exception:\n    pass", "except Exception: pass hides every error"),
    ("megatron/model/a.py", "from os import *", "star import"),
    ("megatron/model/a.py", "def f():\n    global x\n    x = 1", "module-level mutable state (x)"),
    ("megatron/model/a.py", "assert (x, 'text')", "assert on a tuple is always true"),
    ("megatron/model/a.py", "y = 1 if not model.eval else 2", "`model.eval` tests a method, not its result: always true"),
    ("megatron/model/a.py", "x = 1  # TO" + "DO: later", "TO" + "DO in a comment: do it or file it"),
    ("tools/a.py", '"""Comes later, in iss' + 'ue 7."""', "'iss" + "ue 7' means nothing to a reader of the code"),
    ("tests/a.py", "# as in https://example.org/x/iss" + "ues/7", "'/iss" + "ues/7' means nothing to a reader of the code"),
    ("tests/a.py", "host = 'node3." + "internal'", "'node3." + "internal' means nothing to a reader of the code"),
    ("tests/a.py", "x = '/" + "home/somebody/data'", "'/" + "home/s' means nothing to a reader of the code"),
    ("megatron/model/a.py", "# measured with /" + "scratch/run7/config.yml", "'/" + "scratch/r' means nothing to a reader of the code"),
    ("tests/a.py", "x = f'{1} /" + "tmp/x/y'", "'/" + "tmp/x' means nothing to a reader of the code"),
    ("docs/a.md", "Data lie in `/" + "mnt/data`.", "'/" + "mnt/d' means nothing to a reader of the code"),
    ("megatron/model/utils.py", "x = 1", "the file name says nothing about what is inside"),
    ("megatron/config/a.py", "import torch.nn", "layer 'config' imports torch"),
    ("megatron/config/a.py", "def f():\n    from numpy import array", "layer 'config' imports numpy"),
    ("megatron/model/a.py", "from megatron.training.step import take_step", "layer 'model' imports 'training', which is not to its left"),
    ("megatron/model/a.py", "from megatron import training", "layer 'model' imports 'training', which is not to its left"),
    ("megatron/model/moe/a.py", "from ...data import loader", "layer 'model' imports 'data', which is not to its left"),
    ("megatron/monitor/a.py", "import megatron.training", "layer 'monitor' imports 'training', which is not to its left"),
    ("megatron/inference/a.py", "import megatron.analysis", "layer 'inference' imports 'analysis', which is not to its left"),
    ("megatron/training/a.py", "from megatron.analysis import routing", "layer 'training' imports 'analysis', which is not to its left"),
    ("megatron/training/a.py", "import megatron.testing.tiny", "layer 'training' imports 'testing', which is not to its left"),
    ("megatron/testing/a.py", "import megatron.training", "layer 'testing' imports 'training', which is not to its left"),
    ("megatron/elsewhere/a.py", "x = 1", "'elsewhere' is in no layer: give it a place in LAYERS"),
    ("megatron/__init__.py", "import os", "imports os: importing the package must cost nothing"),
]


@pytest.mark.parametrize(("name", "source", "problem"), WRONG_PROGRAMS, ids=[problem[:60] for _, _, problem in WRONG_PROGRAMS])
def test_a_wrong_program_is_found(tmp_path: Path, name: str, source: str, problem: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    found = list(breaches(tmp_path))
    assert len(found) == 1, found
    assert found[0].endswith(problem)


RIGHT_PROGRAMS = [
    ("megatron/model/a.py", f"class C:\n    def f(self, {SIX}): ..."),
    ("megatron/model/a.py", "model.eval()\nif self.training: x = 1"),
    ("megatron/training/a.py", "import megatron.monitor.console\nfrom megatron.checkpoint import save"),
    ("megatron/testing/a.py", "import megatron.config.loader"),
    ("megatron/analysis/a.py", "import megatron.inference.model\nfrom megatron.convert import opened"),
    ("megatron/kernels/a.py", f"@torch.library.custom_op('x::y', mutates_args=())\ndef f({SIX}, g): ..."),
    ("megatron/convert/huggingface/a.py", f"class C:\n    def forward(self, {SIX}, g): ..."),
    ("train.py", "print('a command line may talk')\nimport megatron.training"),
    (
        "tests/a.py",
        "x = ['/proc/self/maps', '/nowhere/a', 'data/text/a.txt', 'http://127.0.0.1/a/b', f'{1}/a/b', '../shared/data', '~/a/b', 'and/or/not']",
    ),
    ("docs/a.md", "`PYTHON=/opt/python/bin/python3`, `megatron/model/gpt.py`, https://example.org/a/b"),
]


@pytest.mark.parametrize(("name", "source"), RIGHT_PROGRAMS)
def test_a_right_program_passes(tmp_path: Path, name: str, source: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    assert list(breaches(tmp_path)) == []
