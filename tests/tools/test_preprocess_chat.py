"""tools/datasets/preprocess_data_with_chat_template.py: that its arguments do what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.data.indexed import IndexedDataset
from tests.data.chat_model import CHAT, CHATML, make_chat_model
from tools.datasets import preprocess_data_with_chat_template as command


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    model = make_chat_model(tmp_path / "model", CHATML, "<|endoftext|>")
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"talk": CHAT, "good": number % 2 == 0}) + "\n" for number in range(3)))
    return ["--input", str(path), "--jsonl-keys", "talk", "--tokenizer-path", str(model), "--output-prefix", str(tmp_path / "out")]


def learned(prefix: Path) -> list[int]:
    """Labels that are not ignored, of each document."""
    dataset = IndexedDataset(prefix)
    return [int((dataset.get(number) != -100).sum()) for number in range(len(dataset))]


def test_the_arguments_act(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "out_talk_label_document"
    command.main([*given, "--reward-key", "good", "--binary-reward", "--workers", "1", "--dataset-impl", "mmap", "--ftfy"])
    both = learned(labels)
    rewards = IndexedDataset(tmp_path / "out_talk_reward_document")
    assert [rewards.get(number).tolist() for number in range(3)] == [[1], [-1], [1]]
    assert f"{tmp_path}/out_talk_reward_document.bin and .idx\n3 documents, " in capsys.readouterr().out
    command.main([*given, "--only-last"])
    last = learned(labels)
    command.main([*given, "--generation-role", "user"])
    user = learned(labels)
    command.main([*given, "--for-rm"])
    assert learned(labels) == [1, 1, 1]
    assert 1 < last[0] < both[0]
    assert user[0] not in (0, both[0])
    for path in tmp_path.glob("out_*"):
        path.unlink()
    command.main([*given, "--no-mask"])
    assert sorted(path.name for path in tmp_path.glob("out_*")) == ["out_talk_document.bin", "out_talk_document.idx"]


def test_arguments_that_contradict_each_other(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--no-mask", "--for-rm"), "argument --for-rm: not allowed with argument --no-mask"),
        (("--binary-reward",), "--binary-reward needs --reward-key, the key of a record that holds its reward"),
    ):
        with pytest.raises(SystemExit):
            command.main([*given, *more])
        assert message in capsys.readouterr().err
