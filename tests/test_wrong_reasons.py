"""What the machine refuses, or a package lacks, is not called damage or a package that is not there."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.reading import read_file
from megatron.convert import tensor_files
from megatron.convert.errors import ConversionError
from megatron.data.corpus.hub import hub_errors
from megatron.data.indexed import DatasetError
from megatron.data.optional import import_optional
from megatron.data.sample import map_cache


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()  # cannot be read by root either
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read: Is a directory\.$"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read: Is a directory\.$"):
        read_file(tmp_path / "manifest.json", mmap=False)


def test_a_file_that_does_not_fit_the_memory_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("torch.load", refuse)
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read: there is not enough memory for it"):
        read_file(tmp_path / "x.pt", mmap=False)


def test_index_maps_that_may_not_be_read_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("document_index", "sample_index", "shuffle_index"):
        np.save(tmp_path / f"{name}.npy", np.arange(3))

    def refuse(number: int) -> Any:
        def load(*_: Any, **__: Any) -> None:
            raise OSError(number, "refused")

        return load

    monkeypatch.setattr(np, "load", refuse(errno.EACCES))
    assert map_cache.load(tmp_path) is None
    monkeypatch.setattr(np, "load", refuse(errno.EMFILE))
    with pytest.raises(OSError, match="refused"):
        map_cache.load(tmp_path)
    monkeypatch.undo()
    assert map_cache.load(tmp_path) is not None
    (tmp_path / "sample_index.npy").write_bytes(b"")
    assert map_cache.load(tmp_path) is None
    assert not tmp_path.exists()


def test_a_full_disk_is_not_a_wrong_name_on_the_hub() -> None:
    with pytest.raises(OSError, match="No space left"), hub_errors("owner/name"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DatasetError, match="owner/name could not be read"), hub_errors("owner/name"):
        raise OSError("no such repository")


def test_a_package_that_is_installed_and_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenpackage.py").write_text("raise ImportError('libarrow.so: cannot open shared object file')\n")
    (tmp_path / "lacking.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, reason in (("brokenpackage", "libarrow.so: cannot open shared object file"), ("lacking", "No module named 'no_such_dependency'")):
        with pytest.raises(DatasetError) as caught:
            import_optional(name, "reading needs it")
        assert str(caught.value) == f"reading needs it. The package is installed but cannot be imported: {reason}"
    for name in ("no_such_package", "no_such_package.inner"):
        with pytest.raises(DatasetError) as caught:
            import_optional(name, "reading needs it")
        assert str(caught.value) == "reading needs it"


def test_weights_that_may_not_be_read_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tensor_files, "safe_open", refuse)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read: Permission denied\.$"):
        tensor_files.StoredTensors(tmp_path)
