"""Which samples a run sees: splits, rank slices, resuming, worker processes; and a sentence for data that cannot serve."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.loader import SamplePlan, batches, build_data
from megatron.data.sample.map_cache import load_or_build
from megatron.data.sample.packed import PackedDataset
from megatron.data.sample.samples import Source
from megatron.data.split import split_documents
from tests.data.conftest import write

PLAN = SamplePlan(train_samples=10, valid_samples=2, test_samples=0)


@pytest.fixture
def packed(numbered: Callable[..., Path]) -> PackedDataset:
    """14 tokens, 10 samples asked for: the golden vector's data set."""
    file = IndexedDataset(numbered([3, 2, 4, 5]))
    return PackedDataset(Source(file), load_or_build(file, range(4), seq_length=4, num_samples=10, seed=1234), "train")


def test_golden_splits(golden: dict[str, Any]) -> None:
    for case in golden["splits"]:
        train, valid, test = split_documents(case["split"], case["documents"])
        assert [train.start, train.stop, valid.stop, test.stop] == case["bounds"]
        assert (valid.start, test.start) == (train.stop, valid.stop)


def test_one_share_means_all_for_training() -> None:
    assert split_documents("1", 10) == (range(10), range(10, 10), range(10, 10))
    assert split_documents("8/2", 10) == (range(8), range(8, 10), range(10, 10))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan"])
def test_bad_splits_are_explained(split: str) -> None:
    with pytest.raises(DatasetError, match="give one to three shares"):
        split_documents(split, 10)


def test_length_is_one_short_as_in_neox(packed: PackedDataset) -> None:
    assert len(packed.maps.shuffle_index) == 10
    assert len(packed) == 9
    with pytest.raises(IndexError, match="sample 9 of 9 in train"):
        packed[9]


def test_samples_are_the_documents_in_shuffled_order_overlapping_by_one(packed: PackedDataset) -> None:
    stream = np.concatenate([packed.source.tokens.get(document) for document in packed.maps.document_index])
    for i in range(len(packed)):
        row = int(packed.maps.shuffle_index[i])
        text = packed[i]["text"]
        assert text.dtype == np.int64
        assert text.tolist() == stream[4 * row : 4 * row + 5].tolist()


def take(dataset: PackedDataset, count: int, **options: Any) -> list[list[list[int]]]:
    source = batches(dataset, **options)
    taken = [batch["text"].tolist() for batch in itertools.islice(source, count)]
    source.close()
    return taken


def test_ranks_take_neighbouring_slices_and_the_data_wraps(packed: PackedDataset) -> None:
    samples = [packed[i]["text"].tolist() for i in range(8)]  # 9 samples, 4 a step: the ninth is dropped
    for rank in range(2):
        taken = take(packed, 3, micro_batch=2, rank=rank, world_size=2)
        assert taken == [samples[2 * rank : 2 * rank + 2], samples[4 + 2 * rank : 6 + 2 * rank], samples[2 * rank : 2 * rank + 2]]


@pytest.mark.parametrize("start", [1, 3, 5, 1000])
def test_resuming_continues_exactly(packed: PackedDataset, start: int) -> None:
    straight = take(packed, start + 6, micro_batch=2)
    assert take(packed, 6, micro_batch=2, start_iteration=start) == straight[start:]


def test_batches_are_tensors(packed: PackedDataset) -> None:
    batch = next(batches(packed, micro_batch=3))
    assert list(batch) == ["text"]
    assert (batch["text"].dtype, tuple(batch["text"].shape)) == (torch.int64, (3, 5))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_keep_the_order(packed: PackedDataset, num_workers: int) -> None:
    expected = take(packed, 20, micro_batch=2, start_iteration=3)
    assert take(packed, 20, micro_batch=2, start_iteration=3, num_workers=num_workers) == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(packed: PackedDataset, num_workers: int) -> None:
    before = torch.get_rng_state()
    take(packed, 2, micro_batch=2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_survive_the_signals_that_end_a_run(packed: PackedDataset) -> None:
    """Ctrl-C and SIGTERM go to every process of the group; the one that trains still has to finish its step."""
    expected = take(packed, 30, micro_batch=2)
    source = batches(packed, micro_batch=2, num_workers=2)
    taken = [next(source)["text"].tolist() for _ in range(2)]  # one from each: both have started
    children = [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    workers = [pid for pid, command in commands.items() if command == Path("/proc/self/cmdline").read_bytes()]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    taken += [batch["text"].tolist() for batch in itertools.islice(source, 28)]
    assert taken == expected
    source.close()
    assert next(source, None) is None
    assert not any(Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers)


def test_a_split_of_one_file(numbered: Callable[..., Path], data_config: Callable[..., Any]) -> None:
    path = numbered([10] * 10)
    data = build_data(data_config(data_path=str(path), split="8,2,0"), seq_length=4, plan=PLAN, seed=1)
    assert isinstance(data.train, PackedDataset)
    assert isinstance(data.valid, PackedDataset)
    assert set(data.train.maps.document_index.tolist()) == set(range(8))
    assert set(data.valid.maps.document_index.tolist()) == {8, 9}
    assert data.test is None


def test_separate_paths(numbered: Callable[..., Path], data_config: Callable[..., Any]) -> None:
    one, two, held_out = (str(numbered([30, 40], name)) for name in ("one", "two", "held_out"))
    config = data_config(train_data_paths=[one, two], train_data_weights=[1.0, 3.0], valid_data_paths=[held_out], test_data_paths=[held_out])
    data = build_data(config, seq_length=4, plan=PLAN, seed=1, vocab_size=70)
    assert data.train is not None
    assert data.valid is not None
    assert data.test is None
    assert len(data.train) == sum(len(part) for part in data.train.datasets)
    assert next(batches(data.valid, micro_batch=2))["text"].shape == (2, 5)


def test_warm_up_reads_the_file(numbered: Callable[..., Path], data_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(IndexedDataset, "warm_up", lambda self: read.append(self.prefix))
    path = numbered([30])
    for wanted in (False, True):
        build_data(data_config(data_path=str(path), split="1", mmap_warmup=wanted), seq_length=4, plan=PLAN, seed=1)
    assert read == [path]
    monkeypatch.undo()
    IndexedDataset(path).warm_up()


def test_no_data_at_all_is_explained(data_config: Callable[..., Any]) -> None:
    with pytest.raises(DatasetError, match="no training data: set data_path, or train_data_paths"):
        build_data(data_config(), seq_length=4, plan=PLAN, seed=1)


def test_zero_documents_are_explained(tmp_path: Path, data_config: Callable[..., Any]) -> None:
    path = write(tmp_path / "text", [])
    with pytest.raises(DatasetError, match="text holds no documents"):
        build_data(data_config(data_path=str(path)), seq_length=4, plan=PLAN, seed=1)
    with pytest.raises(DatasetError, match=r"text: no documents to draw samples from \(the file has 0\)"):
        build_data(data_config(train_data_paths=[str(path)]), seq_length=4, plan=PLAN, seed=1)


@pytest.mark.parametrize(
    ("documents", "valid", "test"),
    [(1, False, False), (2, False, False), (16, False, False), (17, True, False), (499, True, False), (501, True, True)],
)
def test_few_documents_train_without_the_losses_that_get_none(
    numbered: Callable[..., Path], data_config: Callable[..., Any], caplog: pytest.LogCaptureFixture, documents: int, valid: bool, test: bool
) -> None:
    config, plan = data_config(data_path=str(numbered([10] * documents))), SamplePlan(train_samples=8, valid_samples=4, test_samples=4)
    data = build_data(config, seq_length=4, plan=plan, seed=1)
    assert data.train is not None
    assert (data.valid is not None, data.test is not None) == (valid, test)
    said = f"split = '969, 30, 1' leaves no document of {config.data_path} ({documents:,} documents) for"
    assert (f"{said} valid: there is no validation loss. Give valid a larger share to have one." in caplog.text) == (not valid)
    assert (f"{said} test: there is no test loss. Give test a larger share to have one." in caplog.text) == (not test)


def test_what_is_not_wanted_is_not_mentioned(
    numbered: Callable[..., Path], data_config: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = data_config(data_path=str(numbered([10] * 7)), split="949,50,1")
    assert build_data(config, seq_length=4, plan=SamplePlan(train_samples=3, valid_samples=0, test_samples=0), seed=1).valid is None
    for split in ("100", "1,0,0", "1"):
        assert build_data(data_config(data_path=config.data_path, split=split), seq_length=4, plan=PLAN, seed=1).valid is None
    assert caplog.text == ""


@pytest.mark.parametrize(("split", "documents"), [("0.001,1,0", 7), ("0.1,0.9,0", 1)])
def test_nothing_to_train_on_is_an_error(numbered: Callable[..., Path], data_config: Callable[..., Any], split: str, documents: int) -> None:
    config = data_config(data_path=str(numbered([10] * documents)), split=split)
    with pytest.raises(DatasetError, match=rf"split = '{split}' leaves no document of .* for train, so there is nothing to train on; give train a"):
        build_data(config, seq_length=4, plan=PLAN, seed=1)


def test_a_part_shorter_than_a_sequence_is_repeated_and_gives_a_step_s_samples(
    numbered: Callable[..., Path], data_config: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    path, plan = str(numbered([3, 2])), SamplePlan(train_samples=4, valid_samples=1, test_samples=0, samples_at_once=4)
    data = build_data(data_config(data_path=path, split="1,1,0"), seq_length=8, plan=plan, seed=1)
    assert data.train is not None
    assert data.valid is not None
    assert (len(data.train) >= 4, len(data.valid) >= 4) == (True, True)
    assert set(data.train[0]["text"].tolist()) == {0, 1, 2}
    assert set(data.valid[3]["text"].tolist()) == {3, 4}
    assert f"{path}: the valid part, 1 document(s) with 2 tokens, is shorter than one sequence, so it is repeated in each sequence." in caplog.text


def test_a_tiny_corpus_among_several(numbered: Callable[..., Path], data_config: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    large, tiny = str(numbered([50] * 20, "large")), str(numbered([3], "tiny"))
    plan = SamplePlan(train_samples=20, valid_samples=4, test_samples=0, samples_at_once=4)
    config = data_config(train_data_paths=[large, tiny], train_data_weights=[0.99, 0.01], valid_data_paths=[tiny], test_data_paths=[tiny])
    data = build_data(config, seq_length=8, plan=plan, seed=1)
    assert data.train is not None
    assert data.valid is not None
    assert len(data.valid) >= 4
    assert all(data.train[index]["text"].shape == (9,) for index in range(20))
    assert f"{tiny}: the train part, 1 document(s) with 3 tokens, is shorter than one sequence" in caplog.text


def test_one_sample_is_too_few(numbered: Callable[..., Path]) -> None:
    file = IndexedDataset(numbered([5]))
    with pytest.raises(DatasetError, match=r"the train documents give 1 sample\(s\)\. The last one is never used, so no sample is left"):
        PackedDataset(Source(file), load_or_build(file, range(1), seq_length=4, num_samples=1, seed=1), "train")


def test_fewer_samples_than_a_step_takes_is_explained(packed: PackedDataset) -> None:
    with pytest.raises(DatasetError, match=r"the data set has 9 samples, fewer than the 10 of one step \(5 on each of 2 ranks\)"):
        batches(packed, micro_batch=5, world_size=2)


def labelled(prefix: Path, mask: Callable[[int], bool], name: str = "labels") -> str:
    """A label file for numbered text: each token itself, -100 where `mask` says so."""
    file = IndexedDataset(prefix)
    documents = [[-100 if mask(token) else token for token in file.get(i).tolist()] for i in range(len(file))]
    return str(write(prefix.with_name(name), documents, "<i4"))


def test_labels_follow_their_tokens_through_packing_and_blending(numbered: Callable[..., Path], data_config: Callable[..., Any]) -> None:
    one, two = numbered([30, 40], "one"), numbered([11, 12], "two")
    texts, labels = [str(one), str(two)], [labelled(path, lambda token: token % 3 == 0, f"{path.name}_labels") for path in (one, two)]
    subsets = ("train", "valid", "test")
    paths = {f"{name}_data_paths": texts for name in subsets} | {f"{name}_label_data_paths": labels for name in subsets}
    data = build_data(data_config(**paths), seq_length=4, plan=PLAN, seed=1, vocab_size=70)
    assert data.train is not None
    batch = next(batches(data.train, micro_batch=8))
    assert torch.equal(batch["label"], torch.where(batch["text"] % 3 == 0, -100, batch["text"]))
    assert (batch["label"].dtype, batch["label"].shape) == (torch.int64, (8, 5))


@pytest.mark.parametrize("pack_impl", ["packed", "pack_until_overflow", "unpacked"])
def test_every_way_of_packing_resumes_exactly(numbered: Callable[..., Path], data_config: Callable[..., Any], pack_impl: str) -> None:
    text = numbered([7, 3, 9, 2, 5, 8])
    keys = {f"{name}_{kind}": [str(path)] for name in ("train", "valid", "test") for kind, path in (("data_paths", text),)}
    keys |= {f"{name}_label_data_paths": [labelled(text, lambda token: token % 2 == 0)] for name in ("train", "valid", "test")}
    config = data_config(**keys, pack_impl=pack_impl, reset_attention_mask=True)

    def drawn(start: int, count: int, num_workers: int = 0) -> list[dict[str, list[list[int]]]]:
        data = build_data(config, seq_length=6, plan=PLAN, seed=1)
        assert data.train is not None
        source = batches(data.train, micro_batch=2, start_iteration=start, num_workers=num_workers)
        taken = [{key: values.tolist() for key, values in batch.items()} for batch in itertools.islice(source, count)]
        source.close()
        return taken

    straight = drawn(0, 12)
    assert set(straight[0]) == {"text", "label", "document"}
    assert drawn(5, 7, num_workers=2) == straight[5:]


@pytest.mark.parametrize("key", ["reset_attention_mask", "reset_position_ids"])
def test_documents_are_numbered_inside_a_sample(numbered: Callable[..., Path], data_config: Callable[..., Any], key: str) -> None:
    path = numbered([3, 0, 2, 4, 5])
    data = build_data(data_config(data_path=str(path), split="1", **{key: True}), seq_length=4, plan=PLAN, seed=1234)
    assert isinstance(data.train, PackedDataset)
    bounds = np.cumsum([3, 0, 2, 4, 5])
    for i in range(len(data.train)):
        sample = data.train[i]
        parts = np.searchsorted(bounds, sample["text"], side="right")
        changes = (parts[1:] != parts[:-1]) | (sample["text"][1:] != sample["text"][:-1] + 1)  # a document may follow itself
        assert sample["document"].tolist() == [0, *np.cumsum(changes).tolist()]
        assert sample["document"].dtype == np.int64


def test_weights_by_numbers_of_documents_override_given_ones(
    numbered: Callable[..., Path], data_config: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    few, many = str(numbered([60] * 2, "few")), str(numbered([6] * 18, "many"))
    config = data_config(train_data_paths=[few, many], train_data_weights=[1.0, 9.0], weight_by_num_documents=True, weighted_sampler_alpha=0.3)
    with caplog.at_level("INFO"):
        data = build_data(config, seq_length=4, plan=SamplePlan(train_samples=50, valid_samples=0, test_samples=0), seed=1)
    assert "train data by numbers of documents: weights 0.8232, 0.1768." in caplog.text
    assert np.bincount(data.train.dataset_index[:40]).tolist() == [33, 7]  # type: ignore[union-attr]


def test_an_epoch_reads_every_corpus_once(numbered: Callable[..., Path], data_config: Callable[..., Any]) -> None:
    long, short = str(numbered([80] * 5, "long")), str(numbered([21, 21], "short"))
    plan = SamplePlan(train_samples=None, valid_samples=0, test_samples=0)
    data = build_data(data_config(train_data_paths=[long, short]), seq_length=4, plan=plan, seed=1).train
    assert [len(part) for part in data.datasets] == [98, 9]  # type: ignore[union-attr]
    assert np.bincount(data.dataset_index).tolist() == [98, 9]  # type: ignore[union-attr]
    part = build_data(data_config(data_path=long, split="4,1,0"), seq_length=4, plan=plan, seed=1).train
    assert sorted(part.maps.document_index.tolist()) == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_whole_documents_suffice_for_one_evaluation_batch(numbered: Callable[..., Path], data_config: Callable[..., Any]) -> None:
    """As many samples as one forward pass takes, of which the last is never used: one more has to be made."""
    plan = SamplePlan(train_samples=8, valid_samples=4, test_samples=0, samples_at_once=4)
    config = data_config(data_path=str(numbered([5] * 20)), split="1,1,0", pack_impl="pack_until_overflow")
    assert next(batches(build_data(config, seq_length=8, plan=plan, seed=1).valid, micro_batch=4))["text"].shape == (4, 9)  # type: ignore[arg-type]
