"""merge_datasets.py: the documents of every pair, in order, in one pair; whole or not at all."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron.data.indexed import HEADER, MAGIC, IndexedDataset
from tests.data.conftest import write


@pytest.fixture
def main(tool: Callable[[str], ModuleType]) -> Callable[..., int]:
    return lambda *argv: tool("tools/datasets/merge_datasets.py").main([str(part) for part in argv])


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """part_2 before part_10; beside them what is no pair."""
    folder = tmp_path / "parts"
    folder.mkdir()
    write(folder / "part_10", [[5], [6, 7]])
    write(folder / "part_2", [[1, 2], [], [3, 4]])
    (folder / "prepared.json").write_text("{}")
    return folder


def write_items(prefix: Path, sizes: list[int], boundaries: list[int]) -> None:
    """A pair whose documents have several items each, as Megatron's sentence-split files, or whose boundaries are lost."""
    tokens, ends = sum(sizes), np.cumsum([0, *sizes])
    index = HEADER.pack(MAGIC, 1, 8, len(sizes), len(boundaries)) + struct.pack(f"<{len(sizes)}i", *sizes)
    index += struct.pack(f"<{len(sizes)}q", *(2 * ends[:-1])) + struct.pack(f"<{len(boundaries)}q", *boundaries)
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(np.arange(tokens, dtype="<u2").tobytes())


def test_documents_come_in_natural_order_with_their_boundaries(
    main: Callable[..., int], parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--input", parts, "--output-prefix", tmp_path / "all") == 0
    merged = IndexedDataset(tmp_path / "all")
    assert [merged.get(number).tolist() for number in range(len(merged))] == [[1, 2], [], [3, 4], [5], [6, 7]]
    assert merged.boundaries.tolist() == [0, 1, 2, 3, 4, 5]
    same = write(tmp_path / "same", [[1, 2], [], [3, 4], [5], [6, 7]])
    assert all(Path(f"{same}{suffix}").read_bytes() == (tmp_path / f"all{suffix}").read_bytes() for suffix in (".bin", ".idx"))
    out = capsys.readouterr().out
    assert out == f"1. {parts}/part_2\n2. {parts}/part_10\n{tmp_path}/all: 5 documents, 7 tokens\n"


def test_documents_of_several_items_stay_whole_and_lost_boundaries_are_said(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    write_items(folder / "a", [1, 2, 3, 4], [0, 1, 4])
    write_items(folder / "b", [2, 2], [0])
    write(folder / "c", [])
    write_items(folder / "d", [3, 3], [0, 2])
    assert main("--input", folder, "--output-prefix", tmp_path / "all") == 0
    merged = IndexedDataset(tmp_path / "all")
    assert merged.boundaries.tolist() == [0, 1, 4, 5, 6, 8]
    assert merged.sizes.tolist() == [1, 2, 3, 4, 2, 2, 3, 3]
    out = capsys.readouterr().out
    assert "5 documents, 20 tokens" in out
    assert out.count("notice: ") == 1
    assert f"notice: {folder}/b.idx has lost its document boundaries (GPT-NeoX's own merge_datasets.py drops them); each of its 2 items" in out


def test_a_second_run_into_the_same_folder_does_not_merge_its_own_output(main: Callable[..., int], parts: Path) -> None:
    for _ in range(2):
        assert main("--input", parts, "--output-prefix", parts / "all") == 0
        assert IndexedDataset(parts / "all").num_tokens == 7


def test_what_cannot_be_merged_is_explained(main: Callable[..., int], parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def problem(*argv: object) -> str:
        assert main(*argv) == 1
        return capsys.readouterr().err

    all_of_it = ("--output-prefix", tmp_path / "all")
    assert problem("--input", tmp_path / "none", *all_of_it) == (
        f"--input {tmp_path}/none: no such folder; give the folder that holds the .bin/.idx pairs\n"
    )
    (tmp_path / "empty").mkdir()
    assert problem("--input", tmp_path / "empty", *all_of_it) == f"--input {tmp_path}/empty: no .bin/.idx pairs in this folder\n"
    write(tmp_path / "empty" / "all", [[1]])
    assert "no .bin/.idx pairs in this folder but the one to be written" in problem(
        "--input", tmp_path / "empty", "--output-prefix", tmp_path / "empty" / "all"
    )
    assert f"--output-prefix {tmp_path}/no/all: there is no folder {tmp_path}/no; make it" in problem(
        "--input", parts, "--output-prefix", tmp_path / "no" / "all"
    )
    write(parts / "part_3", [[70_000]], "<i4")
    assert problem("--input", parts, *all_of_it).startswith(
        f"{parts}/part_2 holds tokens of type uint16 and {parts}/part_3 of type int32: they come from vocabularies of different size and"
    )
    os.truncate(parts / "part_3.bin", 2)
    assert "part_3.bin has 2 bytes but part_3.idx describes 4" in problem("--input", parts, *all_of_it)
    os.remove(parts / "part_3.bin")
    assert f"no file {parts}/part_3.bin" in problem("--input", parts, *all_of_it)
    assert not list(tmp_path.glob("all*"))


def test_a_full_disk_is_a_sentence(main: Callable[..., int], tmp_path: Path, small_disk: Path | None, capsys: pytest.CaptureFixture[str]) -> None:
    if small_disk is None:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    write(tmp_path / "large", [[0] * 700_000])
    assert main("--input", tmp_path, "--output-prefix", small_disk / "all") == 1
    assert f"{small_disk}: No space left on device (disk {small_disk}, " in capsys.readouterr().err
    assert not list(small_disk.glob("all*"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_it_leaves_what_was_there_and_can_be_run_again(
    main: Callable[..., int], parts: Path, tmp_path: Path, repository: Path, how: signal.Signals
) -> None:
    write(tmp_path / "all", [[9]])
    large = 2 << 30  # bytes of zeros, which take no room on the disk
    write_items(parts / "zeros", [10], [0, 1])
    os.truncate(parts / "zeros.bin", large)
    (parts / "zeros.idx").write_bytes(
        HEADER.pack(MAGIC, 1, 8, 2, 3) + struct.pack("<2i", large // 4, large // 4) + struct.pack("<2q", 0, large // 2) + struct.pack("<3q", 0, 1, 2)
    )
    command = [sys.executable, "tools/datasets/merge_datasets.py", "--input", str(parts), "--output-prefix", str(tmp_path / "all")]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "all.bin.partial"
    while not (partial.exists() and partial.stat().st_size > 1 << 20):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.001)
    process.send_signal(how)
    error = process.communicate()[1]
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert IndexedDataset(tmp_path / "all").tokens.tolist() == [9]
    assert partial.exists() == (how == signal.SIGKILL)
    assert "Traceback" not in error
    assert error.endswith("Interrupted.\n") == (how == signal.SIGINT)
    for suffix in (".bin", ".idx"):
        os.remove(parts / f"zeros{suffix}")
    assert main("--input", parts, "--output-prefix", tmp_path / "all") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.bin", "all.idx", "parts"]
    assert IndexedDataset(tmp_path / "all").num_tokens == 7


def test_texts_and_their_labels_do_not_become_one(main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tool for masks writes both in one type into one folder."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("a_label_document", "a_text_document"):
        write(folder / name, [[1, 2]])
    assert main("--input", folder, "--output-prefix", tmp_path / "all") == 1
    sentence = "are of different kinds by their names (label and text) and must not become documents of one file. Put each kind into its own folder"
    assert f"{folder}/a_label_document and {folder}/a_text_document {sentence} and merge the folders one by one\n" in capsys.readouterr().err
    assert not list(tmp_path.glob("all*"))
    (folder / "a_text_document.bin").unlink()
    (folder / "a_text_document.idx").unlink()
    write(folder / "b_label_document", [[3]])
    assert main("--input", folder, "--output-prefix", tmp_path / "all") == 0
