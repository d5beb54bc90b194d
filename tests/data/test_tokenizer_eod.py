"""End of turn and end of text are two things: which token ends a document, and at which an answer is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.data.tokenizer.eod import find_end_of_document, find_stop_tokens

CHATML = "{{ '<|im_start|>' + m + '<|im_end|>' }}"


def beside(folder: Path, **files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("vocabulary", "settings", "end"),
    [
        (["<|endoftext|>", "<|im_end|>"], {"eos_token": "<|im_end|>", "chat_template": CHATML}, "<|endoftext|>"),  # Qwen
        (["<|end_of_text|>", "<|eot_id|>"], {"eos_token": "<|eot_id|>"}, "<|end_of_text|>"),  # Llama 3
        (["</s>", "<|im_end|>"], {"eos_token": "<|im_end|>", "chat_template": CHATML}, "</s>"),  # ChatML over Llama 2
        (["<eos>", "<end_of_turn>"], {"eos_token": "<end_of_turn>"}, "<eos>"),  # Gemma
        (["</s>", "<|odd|>"], {"eos_token": "<|odd|>", "chat_template": "{{ m }}<|odd|>"}, "</s>"),
        (["</s>", "<|odd|>"], {"eos_token": "<|odd|>", "chat_template": [{"name": "default", "template": "{{ m }}<|odd|>"}]}, "</s>"),
        (["</s>", "<|odd|>"], {"eos_token": "<|odd|>"}, "<|odd|>"),
        (["</s>", "<eos>"], {"eos_token": "<eos>", "chat_template": "{{ m }}<eos>"}, "<eos>"),
        (["<|im_end|>"], {"eos_token": "<|im_end|>", "chat_template": CHATML}, "<|im_end|>"),  # the only end that there is
        (["a"], {"eos_token": "b"}, None),
    ],
)
def test_the_end_of_a_document(vocabulary: list[str], settings: dict[str, Any], end: str | None, tmp_path: Path) -> None:
    ids = {name: number for number, name in enumerate(vocabulary, start=7)}
    found = find_end_of_document(ids.get, beside(tmp_path, tokenizer_config=settings))
    assert found == (None if end is None else ids[end])


def test_older_files_name_the_token_elsewhere(tmp_path: Path) -> None:
    folder = beside(tmp_path, tokenizer_config={}, special_tokens_map={"eos_token": {"content": "<stop>"}})
    assert find_end_of_document({"<stop>": 3}.get, folder) == 3


def test_a_template_in_a_file_of_its_own_counts(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ m }}<|odd|>")
    assert find_end_of_document({"</s>": 1, "<|odd|>": 2}.get, beside(tmp_path, tokenizer_config={"eos_token": "<|odd|>"})) == 1


@pytest.mark.parametrize(
    ("generation", "ids", "stops"),
    [
        ({"eos_token_id": [8, 9]}, {"eos_token_id": 8}, (1, 2, 8, 9)),
        ({"eos_token_id": 9}, {"eos_token_id": [8, 5]}, (1, 2, 9, 8, 5)),
        ({}, {"eos_token_id": None}, (1, 2)),
        ({"eos_token_id": [True, "x", -1, 4]}, {}, (1, 2, 4)),
    ],
)
def test_an_answer_is_over_at_every_end(generation: dict[str, Any], ids: dict[str, Any], stops: tuple[int, ...], tmp_path: Path) -> None:
    folder = beside(tmp_path, tokenizer_config={"eos_token": "<|im_end|>"}, generation_config=generation, token_ids=ids)
    assert find_stop_tokens({"<|im_end|>": 2}.get, folder, 1) == stops
    assert find_stop_tokens({}.get, None, None) == ()
