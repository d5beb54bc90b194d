"""Experts rest in a checkpoint, in one packed file, or in a Hugging Face folder; what is not as it was is noticed and never computed with."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.inference.model import ReadyModel
from megatron.inference.offload.errors import OffloadError
from megatron.inference.offload.files import BLOCK, WatchedFile
from tests.convert.models import CASES
from tests.inference.offload.conftest import KINDS, PROMPT, load, logits_of, write_model

Tool = Callable[[str], Any]
Pack = Callable[..., Path]


@pytest.fixture
def pack(tool: Tool) -> Pack:
    def written(source: str, target: Path, *options: str) -> Path:
        assert tool("tools/ckpts/pack_experts.py").main([source, str(target), *options]) == 0
        return target

    return written


@pytest.mark.parametrize("kind", ["plain", "gated bf16", "structmoe", "decomposed", "by layer"])
def test_a_packed_file_gives_the_same(pack: Pack, kind: str, tmp_path: Path) -> None:
    keys = write_model(tmp_path / "run", KINDS[kind])
    file = pack(keys["load"], tmp_path / "experts.packed")
    ready = load(keys, slots=3, store=str(file))
    assert torch.equal(logits_of(ready), logits_of(load(keys)))
    assert ready.offloaded is not None
    for records in ready.offloaded.store.places.values():
        assert all(place.file == file for record in records for place in record.values())
        assert all(min(place.offset for place in record.values()) % BLOCK == 0 for record in records)


def test_lores_packed(pack: Pack, structmoe: dict[str, Any], tmp_path: Path) -> None:
    file = pack(structmoe["load"], tmp_path / "lores.packed", "--granularity", "lore")
    assert torch.equal(logits_of(load(structmoe, slots=4, store=str(file), granularity="lore")), logits_of(load(structmoe)))
    with pytest.raises(OffloadError, match=r"24 units with lores\.a, lores\.b for layer 0, and the model has 6 with lores\.a, .*same granularity"):
        load(structmoe, slots=4, store=str(file))


def test_packed_experts_in_place(pack: Pack, gated: dict[str, Any], tmp_path: Path) -> None:
    file = pack(gated["load"], tmp_path / "experts.packed")
    ready = load(gated, slots=1, policy="static", misses="in_place", store=str(file))
    assert torch.equal(logits_of(ready), logits_of(load(gated)))


def test_packing_goes_on_after_a_break(pack: Pack, tool: Tool, gated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack(gated["load"], tmp_path / "whole").read_bytes()
    from megatron.inference.offload import packed

    written: list[int] = []
    write = packed._write_layer

    def stopped(file: Any, begin: int, layer: Any, weights: Any) -> list[int]:
        if layer.layer == 2 and len(written) == 2:
            raise OSError(28, os.strerror(28))
        written.append(layer.layer)
        return write(file, begin, layer, weights)

    monkeypatch.setattr(packed, "_write_layer", stopped)
    assert tool("tools/ckpts/pack_experts.py").main([gated["load"], str(tmp_path / "experts")]) == 1
    assert not (tmp_path / "experts").exists()
    written.append(-1)
    assert pack(gated["load"], tmp_path / "experts").read_bytes() == whole
    assert written == [0, 1, -1, 2]
    assert not list(tmp_path.glob("experts.*"))


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2-moe", "own"])
def test_a_hugging_face_folder(kind: str, pack: Pack, tool: Tool, tmp_path: Path) -> None:
    keys = write_model(tmp_path / "run", KINDS["structmoe"] if kind == "own" else CASES[kind][1])
    export, command = tmp_path / "export", tool("tools/ckpts/convert_neox_to_hf.py").main
    architecture = [] if kind == "own" else ["--architecture", CASES[kind][0]]
    assert command(["--input_dir", keys["load"], "--output_dir", str(export), "--skip-check", "--no_save_tokenizer", *architecture]) == 0
    expected = logits_of(load(keys))
    for form in ([], ["--index"]):
        file = pack(str(export), tmp_path / f"experts{len(form)}", *form)
        assert torch.equal(logits_of(load(keys, slots=3, store=str(file))), expected)
    if kind == "own":
        return
    with pytest.raises(OffloadError, match=r"w2 of layer \d is not stored as the model computes with it .*transposed"):
        logits_of(load(keys, slots=1, policy="static", misses="in_place", store=str(file)))


def begun(keys: dict[str, Any], store: Path | None) -> ReadyModel:
    """A model that has generated once."""
    ready = load(keys, slots=2, **({} if store is None else {"store": str(store)}))
    logits_of(ready)
    return ready


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def remove(file: Path) -> None:
    file.unlink()


def change(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-5000, os.SEEK_END)
        opened.write(b"changed")


def replace(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "was cut short while the model was running"),
        (remove, "was removed while the model was running"),
        (change, "was changed while the model was running"),
        (replace, "was changed while the model was running"),
    ],
)
def test_a_file_that_changes_while_running(pack: Pack, damage: Callable[[Path], None], message: str, packed: bool, tmp_path: Path) -> None:
    keys = write_model(tmp_path / "run", KINDS["gated"])
    file = pack(keys["load"], tmp_path / "experts.packed") if packed else Path(keys["load"]) / "global_step2/mp_rank_00_model_states.pt"
    ready = begun(keys, file if packed else None)
    damage(file)
    for _ in range(2):  # the second time, too: nothing that was half read is used
        with pytest.raises(OffloadError, match=message):
            logits_of(ready, PROMPT[::-1])


def test_a_file_cut_before_the_start(pack: Pack, gated: dict[str, Any], tmp_path: Path) -> None:
    file = pack(gated["load"], tmp_path / "experts.packed")
    cut(file)
    with pytest.raises(OffloadError, match=r"experts\.packed has [\d,]+ bytes of [\d,]+: it was cut short\. Copy or write it again"):
        load(gated, slots=2, store=str(file))


def test_a_damaged_record_is_not_computed_with(pack: Pack, gated: dict[str, Any], tmp_path: Path) -> None:
    file = pack(gated["load"], tmp_path / "experts.packed")
    change(file)
    with pytest.raises(OffloadError, match=r"the record of layer 2, unit 7 is damaged \(its checksum differs\)\. Write the file again"):
        logits_of(load(gated, slots=2, store=str(file)))


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("good", [0, 7, 30])
def test_a_read_error_and_going_on_after_it(good: int, prefetch: bool, gated: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """After `good` reads a disk fails three times in a row. Nothing that was not read is ever computed with."""
    ready, read, expected, count = load(gated, slots=2, prefetch=prefetch), os.preadv, logits_of(load(gated)), [0]

    def failing(*given: Any) -> int:
        count[0] += 1
        if good < count[0] <= good + 3:
            raise OSError(5, os.strerror(5))
        return read(*given)

    monkeypatch.setattr(os, "preadv", failing)
    failures = list[str]()
    for _ in range(8):
        try:
            assert torch.equal(logits_of(ready), expected)
        except OffloadError as error:
            failures.append(str(error))
    assert 1 <= len(failures) <= 3
    assert all(re.search(r"cannot be read at byte [\d,]+: Input/output error", failure) for failure in failures)
    assert torch.equal(logits_of(ready), expected)


def test_what_is_no_store(gated: dict[str, Any], tmp_path: Path) -> None:
    for content in (b"{}", b"nothing", b"NEOXPACK" + (2).to_bytes(8, "little") + b"{}", b"NEOXPACK" + (99).to_bytes(8, "little")):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(OffloadError, match=r"other is not a file of tools/ckpts/pack_experts\.py of this version"):
            load(gated, slots=2, store=str(tmp_path / "other"))
    with pytest.raises(OffloadError, match="missing cannot be read: No such file or directory"):
        load(gated, slots=2, store=str(tmp_path / "missing"))


def test_another_models_file(pack: Pack, gated: dict[str, Any], tmp_path: Path) -> None:
    keys = write_model(tmp_path / "run", KINDS["structmoe"])
    file = pack(keys["load"], tmp_path / "experts.packed")
    with pytest.raises(OffloadError, match=r"experts\.packed holds 6 units with .* for layer 0, and the model has 8 with"):
        load(gated, slots=2, store=str(file))


def test_experts_of_another_checkpoint(pack: Pack, gated: dict[str, Any], tmp_path: Path) -> None:
    file = pack(gated["load"], tmp_path / "experts.packed")
    other = write_model(tmp_path / "run", KINDS["gated"], seed=4)
    with pytest.raises(OffloadError, match=r"the experts in .*experts\.packed are not those of .*, because the routers differ"):
        load(other, slots=2, store=str(file))


def test_an_index_of_a_file_that_changed(pack: Pack, tmp_path: Path) -> None:
    keys = write_model(tmp_path / "run", KINDS["gated"])
    file = pack(keys["load"], tmp_path / "experts.json", "--index")
    assert torch.equal(logits_of(load(keys, slots=2, store=str(file))), logits_of(load(keys)))
    replace(Path(keys["load"]) / "global_step2/mp_rank_00_model_states.pt")
    with pytest.raises(OffloadError, match=r"which has changed since\. Write experts\.json again"):
        load(keys, slots=2, store=str(file))


@pytest.mark.parametrize(("damage", "message"), [(cut, "was cut short"), (remove, "was removed"), (change, "was changed")])
def test_a_file_that_changes_while_experts_are_computed_in_place(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    keys = write_model(tmp_path, KINDS["gated"])
    ready = load(keys, slots=1, policy="static", misses="in_place")
    logits_of(ready)
    damage(tmp_path / "global_step2/mp_rank_00_model_states.pt")
    with pytest.raises(OffloadError, match=message):
        logits_of(ready, PROMPT[::-1])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("offset", "length"), [(0, 4096), (1, 10), (4095, 2), (4090, 5000), (8192, 1808)])
def test_reading_any_part(offset: int, length: int, direct: bool, tmp_path: Path) -> None:
    content = os.urandom(10_000)
    (tmp_path / "file").write_bytes(content)
    file = WatchedFile(tmp_path / "file", direct=direct)
    target = bytearray(length)
    file.read(offset, memoryview(target))
    assert target == content[offset : offset + length]
    with pytest.raises(OffloadError, match=r"has 10,000 bytes, but 10,001 are needed"):
        file.read(9_999, memoryview(bytearray(2)))
    file.close()
