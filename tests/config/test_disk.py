"""What the system refused, in words."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from megatron.config import disk


def refused(path: Path) -> OSError:
    """One of Python's own OSErrors, which have no number."""
    path.symlink_to(path.parent)
    with pytest.raises(OSError, match="symbolic link") as raised:
        shutil.rmtree(path)
    return raised.value


def test_no_reason_is_none(tmp_path: Path) -> None:
    error = refused(tmp_path / "link")
    assert error.strerror is None
    assert disk.reason(error) == "Cannot call rmtree on a symbolic link"
    assert disk.sentence(error, tmp_path) == f"{tmp_path}: Cannot call rmtree on a symbolic link"
    assert disk.sentence(OSError()) == "OSError"


def test_libraries_that_have_words_of_their_own() -> None:
    assert disk.number(Exception("No space left on device (os error 28)")) == errno.ENOSPC
    assert disk.number(OSError("1048576 requested and 131056 written")) == errno.ENOSPC
    assert disk.number(ValueError("no such layer")) is None


def test_a_full_disk_is_named_with_its_room(small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    error = OSError(errno.ENOSPC, "No space left on device")
    assert (
        disk.sentence(error, small_disk / "deep/run/x.pt") == f"{small_disk}/deep/run/x.pt: No space left on device (disk {small_disk}, 1.0 MiB free)"
    )
    assert disk.explained(OSError(errno.EACCES, "Permission denied"), small_disk) == "Permission denied"


@pytest.mark.parametrize(("size", "words"), [(0, "0 bytes"), (1023, "1023 bytes"), (1 << 20, "1.0 MiB"), (3 << 39, "1.5 TiB")])
def test_sizes(size: int, words: str) -> None:
    assert disk.in_words(size) == words
