"""Which checkpoint is found, and what is said when the one asked for cannot be used."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megatron.checkpoint import layout
from megatron.checkpoint.find import find_checkpoint, find_checkpoint_together
from megatron.checkpoint.load import CheckpointError, NoCheckpointError
from tests.checkpoint.made import MODEL_FILE, make_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with whole checkpoints of steps 5, 10 and 100."""
    for iteration in (5, 10, 100):
        make_checkpoint(tmp_path, iteration)
    return tmp_path


def says(message: str, kind: type[CheckpointError] = CheckpointError) -> pytest.RaisesExc:
    return pytest.raises(kind, match=re.escape(message))


def test_latest_decides(run: Path) -> None:
    assert find_checkpoint(run).name == "global_step100"
    (run / "latest").write_text("global_step10\n")
    assert find_checkpoint(f"{run}/") == run / "global_step10"
    assert find_checkpoint_together(run) == run / "global_step10"


def test_an_iteration_can_be_asked_for(run: Path) -> None:
    assert find_checkpoint(run, 5) == run / "global_step5"


def test_without_latest_the_newest_whole_one_is_found(run: Path) -> None:
    (run / "latest").unlink()
    assert find_checkpoint(run).name == "global_step100"
    (run / "global_step100" / MODEL_FILE).unlink()
    assert find_checkpoint(run).name == "global_step10"


def test_another_programs_checkpoint_is_taken_as_it_is(tmp_path: Path) -> None:
    assert find_checkpoint(make_checkpoint(tmp_path, 3, manifest=False).parent).name == "global_step3"


def test_a_tag_of_another_form_is_found_through_latest(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 3, manifest=False).rename(tmp_path / "0")
    (tmp_path / "latest").write_text("0")
    assert find_checkpoint(tmp_path).name == "0"


def test_a_replacement_cut_in_two_is_found(run: Path) -> None:
    (run / "global_step100").rename(layout.replaced(run, 100))
    assert find_checkpoint(run) == layout.replaced(run, 100)


def test_missing_directory(tmp_path: Path) -> None:
    with says(f"so there is no checkpoint to load. {tmp_path} exists. It is empty.", NoCheckpointError):
        find_checkpoint(tmp_path / "nowhere" / "deep")
    make_checkpoint(tmp_path / "first run", 3)
    make_checkpoint(tmp_path / "second", 3)
    with says(f"{tmp_path} exists. There are checkpoints in these directories below it: first run, second. Give one of them.", NoCheckpointError):
        find_checkpoint(tmp_path / "nowhere")


def test_empty_directory(tmp_path: Path) -> None:
    with says("holds no checkpoint (no `latest`, no global_stepN). It is empty.", NoCheckpointError):
        find_checkpoint(tmp_path)
    for number in range(15):
        (tmp_path / f"file{number:02d}").touch()
    with says("holds no checkpoint, so it does not hold the one of iteration 3. It holds: file00, file01,", NoCheckpointError):
        find_checkpoint(tmp_path, 3)
    with says("file11 and 3 more.", NoCheckpointError):
        find_checkpoint(tmp_path)


def test_only_an_interrupted_save(tmp_path: Path) -> None:
    (layout.staging(tmp_path) / "global_step8").mkdir(parents=True)
    with says("Saving global_step8 was interrupted.", NoCheckpointError):
        find_checkpoint(tmp_path)


def test_the_checkpoint_itself_is_no_directory_of_checkpoints(run: Path) -> None:
    with says(f"is a checkpoint itself. Give the directory that holds it, {run}"):
        find_checkpoint(run / "global_step5")


def test_iteration_not_there(run: Path) -> None:
    with says("holds no checkpoint of iteration 7. It holds: 5, 10, 100."):
        find_checkpoint(run, 7)


def test_long_lists_are_shortened(tmp_path: Path) -> None:
    for iteration in range(1, 21):
        (tmp_path / layout.tag(iteration)).mkdir()
    with says("It holds: 1, 2, 3, 4, 5, 6, ... (20 in all), 15, 16, 17, 18, 19, 20."):
        find_checkpoint(tmp_path, 99)


def test_latest_names_a_missing_one(run: Path) -> None:
    shutil.rmtree(run / "global_step100")
    with says(
        "names global_step100, which is missing. The newest undamaged checkpoint is that of iteration 10. To continue from it, add `-o iteration=10`."
    ):
        find_checkpoint(run)


@pytest.mark.parametrize("content", ["", "../elsewhere", "/etc", "\x00"])
def test_latest_names_nothing_here(run: Path, content: str) -> None:
    (run / "latest").write_text(content)
    with says(f"holds {content!r}, which is not the name of a directory beside it. The newest undamaged checkpoint is that of iteration 100"):
        find_checkpoint(run)


def test_truncated_file(run: Path) -> None:
    file = run / "global_step100" / MODEL_FILE
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-7])
    with says(f"{file} is damaged: expected {size:,} bytes, found {size - 7:,}. The newest undamaged checkpoint is that of iteration 10"):
        find_checkpoint(run)
    with says(f"{file} is damaged"):
        find_checkpoint(run, 100)


def test_missing_file(run: Path) -> None:
    (run / "global_step100" / "configs" / "a.yml").unlink()
    with says("names global_step100, which is damaged or incomplete: " + str(run / "global_step100/configs/a.yml is missing: expected 5 bytes.")):
        find_checkpoint(run)


def test_unreadable_file(run: Path) -> None:
    file = run / "global_step100" / "configs" / "a.yml"
    file.unlink()
    file.symlink_to(file)
    with says(f"{file} cannot be read: Too many levels of symbolic links."):
        find_checkpoint(run)


def test_damaged_ones_are_not_offered(run: Path) -> None:
    (run / "global_step100" / MODEL_FILE).unlink()
    (run / "global_step10" / MODEL_FILE).write_bytes(b"")
    with says("that of iteration 5"):
        find_checkpoint(run)
    (run / "global_step5" / "manifest.json").write_text('{"files": 3}')
    with says("holds no other undamaged checkpoint."):
        find_checkpoint(run)
    (run / "latest").unlink()
    with says("is damaged or incomplete: "):
        find_checkpoint(run)


def test_damaged_manifest(run: Path) -> None:
    (run / "global_step100" / "manifest.json").write_text("{")
    with says("manifest.json is damaged (JSONDecodeError"):
        find_checkpoint(run)


def test_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "global_step4").mkdir()
    with says("global_step4 is incomplete: it holds no model weights"):
        find_checkpoint(tmp_path, 4)


def test_many_damaged_files_are_counted(run: Path) -> None:
    path = run / "global_step5"
    manifest = (path / "manifest.json").read_text().replace('"files": {', '"files": {"x": {"size": 1, "sha256": ""}, "y": {"size": 1, "sha256": ""},')
    (path / "manifest.json").write_text(manifest)
    (path / MODEL_FILE).unlink()
    with says("1 more files are damaged"):
        find_checkpoint(run, 5)
