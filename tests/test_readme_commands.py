"""What the documents tell people to type exists: targets, scripts, configurations, options, files and links.

Every command of a fenced `bash`, `sh`, `console` or `shell` block is looked at. A program that is not known here fails too: teach `problems_of`
what it takes.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scripts import run_script

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "configs/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SHELL_BLOCK = re.compile(r"^ *```(?:bash|sh|console|shell)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")
# Programs whose arguments say nothing about this repository.
FREE_PROGRAMS = {
    "lm_eval",
    "git",
    "sbatch",
    "cd",
    "ls",
    "cat",
    "less",
    "open",
    "source",
    "tensorboard",
    "kill",
    "watch",
    "tail",
    "export",
    "mkdir",
    "pre-commit",
    "curl",
}
# Flags of the command lines that are followed by a value.
VALUE_FLAGS = {"-d", "--conf-dir", "--conf_dir", "-o"}


def commands_in(text: str) -> list[str]:
    """The commands of the shell blocks: prompts and comments dropped, continued lines joined, output of `$ ` sessions left out."""
    found: list[str] = []
    for block in SHELL_BLOCK.findall(text):
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in block.replace("\\\n", " ").splitlines()]
        session = any(line.startswith("$ ") for line in lines)
        for line in lines:
            if session and not line.startswith("$ "):
                continue
            found += [part.strip() for part in re.split(r" && |; |\|", line.removeprefix("$ ")) if part.strip()]
    return found


def problems_of(command: str, root: Path) -> Iterator[str]:
    words = shlex.split(command, comments=True)
    while words and re.match(r"^[A-Z_][A-Z0-9_]*=", words[0]):
        words = words[1:]
    if not words or words[0] in FREE_PROGRAMS:
        return
    program, arguments = words[0], words[1:]
    name = Path(program).name
    if name == "make":
        yield from make_problems(arguments, root)
    elif re.fullmatch(r"python(3(\.\d+)?)?", name):
        yield from python_problems(arguments, root)
    elif name == "pytest":
        yield from pytest_problems(arguments, root)
    elif name == "docker":
        yield from docker_problems(arguments, root)
    elif name == "pip":
        yield from pip_problems(arguments, root)
    elif "/" in program:
        yield from missing(program, root)
    else:
        yield f"the program {program!r} is not known to this test"


def missing(path: str, root: Path) -> Iterator[str]:
    """Placeholders (`a.yml`, `DIR/...`, `<name>`) stand for the reader's own files; anything else is in the repository."""
    if not re.search(r"[<>*$]|\.\.\.|^(a|b|my\w*)\.\w+$", path) and not (root / path).exists():
        yield f"{path} does not exist"


def make_problems(arguments: list[str], root: Path) -> Iterator[str]:
    targets = set(re.findall(r"^([a-z][\w-]*):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for argument in arguments:
        if "=" not in argument and not argument.startswith("-") and argument not in targets:
            yield f"the Makefile has no target {argument!r}"


def python_problems(arguments: list[str], root: Path) -> Iterator[str]:
    if not arguments or arguments[0] == "-c":
        return
    if arguments[0] == "-m":
        module, rest = arguments[1], arguments[2:]
        if module == "megatron" or module.startswith("megatron."):
            path = root / module.replace(".", "/")
            if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
                yield f"the module {module} does not exist"
        elif module in {"pytest", "pip"}:
            yield from (pytest_problems if module == "pytest" else pip_problems)(rest, root)
        return
    absent = [problem for word in plain_words(arguments) if word.endswith(".py") for problem in missing(word, root)]
    if absent:
        yield from absent
    elif arguments[0] in {"deepy.py", "train.py", "eval.py", "generate.py"}:
        yield from check_problems(arguments, root)


def plain_words(arguments: list[str]) -> list[str]:
    """The arguments that are neither flags nor the values of flags; `-o` takes everything up to the next flag."""
    words, taking = [], ""
    for argument in arguments:
        if argument.startswith("-"):
            taking = argument if argument in VALUE_FLAGS else ""
        elif taking:
            taking = taking if taking == "-o" else ""
        else:
            words.append(argument)
    return words


def check_problems(arguments: list[str], root: Path) -> Iterator[str]:
    """Have deepy.py read the configuration as the command would, without running anything."""
    words = plain_words(arguments)
    if any(re.fullmatch(r"(a|b|my\w*|how|runs/.*)\.yml", word) for word in words) or not any(word.endswith(".yml") for word in words):
        return
    own = arguments[1:] if arguments[0] == "deepy.py" else arguments
    words = [*own, *([] if "--check" in own else ["--check"])]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as outputs:
        deepy = str(root / "deepy.py")
        finished = run_script(deepy, *words, folder=root, environment=environment, timeout=60, outputs=Path(outputs))
    if finished.returncode != 0:
        yield f"`{shlex.join(['deepy.py', *words])}` fails: {(finished.stderr or finished.stdout).strip()[-1500:]}"


def pytest_problems(arguments: list[str], root: Path) -> Iterator[str]:
    configured = (root / "pyproject.toml").read_text(encoding="utf-8")
    for flag, argument in itertools.pairwise(["", *arguments]):
        if flag == "-m":
            for marker in set(re.findall(r"\w+", argument)) - {"not", "and", "or"}:
                if f'"{marker}:' not in configured:
                    yield f"pytest has no marker {marker!r}"
        elif flag not in {"-k", "-n"} and not argument.startswith("-"):
            yield from missing(argument.split("::")[0], root)


def docker_problems(arguments: list[str], root: Path) -> Iterator[str]:
    for flag, argument in itertools.pairwise(arguments):
        if flag == "--target" and not re.search(
            rf"^FROM .* AS {re.escape(argument)}$", (root / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
        ):
            yield f"the Dockerfile has no target {argument!r}"


def pip_problems(arguments: list[str], root: Path) -> Iterator[str]:
    for flag, argument in itertools.pairwise(arguments):
        if flag in {"-r", "-c", "--requirement", "--constraint"}:
            yield from missing(argument, root)


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_can_be_typed(document: str) -> None:
    text = read(document)
    found = [f"{command}\n    {problem}" for command in commands_in(text) for problem in problems_of(command, ROOT)]
    assert not found, f"{document}:\n" + "\n".join(found)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_into_the_repository_leads_somewhere(document: str) -> None:
    dangling = [target for target in LINK.findall(read(document)) if not (ROOT / document).parent.joinpath(target).exists()]
    assert not dangling, f"{document} links to {dangling}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_spoken_of_exists(document: str) -> None:
    spoken_of = re.findall(r"`make ([a-z][\w-]*)", read(document))
    found = [problem for target in spoken_of for problem in make_problems([target], ROOT)]
    assert not found, f"{document}: {found}"


def read(document: str) -> str:
    path = ROOT / document
    if not path.exists():
        pytest.skip(f"there is no {document}")
    return path.read_text(encoding="utf-8")


@pytest.fixture
def little_repository(tmp_path: Path) -> Path:
    (tmp_path / "Makefile").write_text("train: setup\nsetup:\n")
    (tmp_path / "Dockerfile").write_text("FROM scratch AS cpu\n")
    (tmp_path / "pyproject.toml").write_text('markers = ["slow: takes long"]\n')
    (tmp_path / "prepare_data.py").write_text("")
    (tmp_path / "deepy.py").write_text("import sys; sys.exit('no file wrong.yml' if 'wrong.yml' in sys.argv else 0)\n")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make train TORCH_INDEX_URL=here", None),
        ("make trian", "the Makefile has no target 'trian'"),
        ("python prepare_data.py stdlib -d data", None),
        (".venv/bin/python prepare_dat.py", "prepare_dat.py does not exist"),
        ("python deepy.py train.py -d configs wrong.yml", "train.py does not exist"),
        ("python deepy.py prepare_data.py right.yml", None),
        ("python deepy.py prepare_data.py wrong.yml", "fails: no file wrong.yml"),
        ("python -m megatron.nothing", "the module megatron.nothing does not exist"),
        ("python -m pytest -m 'not slow' tests/nowhere", "tests/nowhere does not exist"),
        ("pytest -m fast", "pytest has no marker 'fast'"),
        ("docker build --target cpu .", None),
        ("docker build --target gpu .", "the Dockerfile has no target 'gpu'"),
        ("pip install -r requirements/none.txt", "requirements/none.txt does not exist"),
        ("OMP_NUM_THREADS=1 tools/none.sh", "tools/none.sh does not exist"),
        ("trainer --fast", "the program 'trainer' is not known to this test"),
    ],
)
def test_wrong_commands_are_found(little_repository: Path, command: str, problem: str | None) -> None:
    found = list(problems_of(command, little_repository))
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]


def test_the_changelog_says_nothing_twice() -> None:
    """Two branches that are merged may both bring an entry."""
    for section in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## "):
        titles = re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE)
        assert sorted(titles) == sorted(set(titles))


def test_commands_are_taken_from_shell_blocks_only() -> None:
    text = """
```bash
make train   # a remark; and more
python deepy.py train.py \\
    a.yml && make test
```
```console
$ make check
All checks passed!
```
```python
make nonsense
```
"""
    assert commands_in(text) == ["make train", "python deepy.py train.py      a.yml", "make test", "make check"]
