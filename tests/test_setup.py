"""Setting up: the pins agree with each other, and requirements/install.sh says what is wrong instead of failing somewhere inside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

TOOLS = ("bash", "env", "cat", "cksum", "cut", "dirname", "grep", "rm", "touch")


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """What install.sh reads, under a path with a space in it, without a .venv."""
    folder = tmp_path / "a checkout"
    for part in ("requirements", "csrc"):
        shutil.copytree(repository / part, folder / part)
    shutil.copy(repository / "pyproject.toml", folder)
    return folder


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with the tools that the script needs and no Python at all."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool} on this machine"))
    return str(folder)


def install(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {name: value for name, value in os.environ.items() if name != "PYTHON"} | environment
    command = [shutil.which("bash") or "bash", "requirements/install.sh", *arguments]
    return subprocess.run(command, cwd=checkout, env=values, capture_output=True, text=True, timeout=60, check=False)


def test_without_a_suitable_python_it_says_what_to_install(checkout: Path, bare_path: str) -> None:
    finished = install(checkout, PATH=bare_path)
    assert finished.returncode == 1
    assert "no Python 3.11 or newer (with its venv module) is on the PATH" in finished.stderr
    assert "make setup PYTHON=" in finished.stderr
    assert not (checkout / ".venv").exists()


def test_a_named_python_that_will_not_do_is_refused(checkout: Path) -> None:
    finished = install(checkout, PYTHON="/nowhere/python3")
    assert finished.returncode == 1
    assert "PYTHON=/nowhere/python3 is not a Python 3.11 or newer" in finished.stderr


def test_an_old_venv_is_refused_and_left_alone(checkout: Path) -> None:
    old_python = checkout / ".venv/bin/python"
    old_python.parent.mkdir(parents=True)
    old_python.write_text('#!/bin/sh\ncase "$*" in --version) echo Python 3.8.1;; *version_info*) exit 1;; esac\n')
    old_python.chmod(0o755)
    finished = install(checkout)
    assert finished.returncode == 1
    assert "the existing .venv is Python 3.8.1, and 3.11 or newer is needed" in finished.stderr
    assert old_python.exists()


def test_an_unknown_set_is_refused(checkout: Path) -> None:
    finished = install(checkout, "everything")
    assert finished.returncode == 2
    assert "'everything' is not a set of requirements; give 'run' or 'dev'" in finished.stderr


def test_when_everything_is_there_nothing_is_done(checkout: Path) -> None:
    """The stamp of the development set serves both; a changed pin or another place makes it stale."""
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n[ $# = 2 ]\n")  # runs, and is good for nothing but being asked whether it does
    python.chmod(0o755)
    files = sorted((checkout / "requirements").glob("*.txt"))
    files += [checkout / "pyproject.toml", checkout / "csrc/build.py", checkout / "csrc/bindings.cpp"]
    files += [*sorted((checkout / "csrc").glob("*/*.cpp")), *sorted((checkout / "csrc").glob("*/*.h"))]
    content = f"{checkout}\n".encode() + b"".join(path.read_bytes() for path in files)
    checksum = subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout.decode().split()[0]
    (checkout / f".venv/.installed-dev-{checksum}").touch()
    for name in ("run", "dev"):
        finished = install(checkout, name)
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    with (checkout / "requirements/requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert install(checkout).returncode != 0


def pins_of(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-"))]
    pins = [line.split(";")[0] for line in lines]  # without the systems that a package is for
    unpinned = [pin for pin in pins if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+", pin)]
    assert not unpinned, f"{path.name}: not an exact version: {unpinned}"
    return {normal(pin.split("==")[0].split("[")[0]): pin.split("==")[1] for pin in pins}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned_and_agrees_with_the_constraints(repository: Path) -> None:
    # pip leaves the build tool out of its list where it comes with the interpreter.
    constraints = pins_of(repository / "requirements/constraints.txt")
    for path in (repository / "requirements").glob("requirements*.txt"):
        assert "-c constraints.txt" in path.read_text(), path.name
        different = {name: version for name, version in pins_of(path).items() if constraints.get(name, version) != version}
        assert not different, f"{path.name} against constraints.txt: {different}"


def test_every_dependency_of_the_package_has_a_pin(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    pinned = pins_of(repository / "requirements/requirements.txt")
    missing = [text for text in project["dependencies"] if normal(re.split(r"[<>=!~ ]", text)[0]) not in pinned]
    assert not missing
