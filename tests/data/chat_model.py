"""A small tokenizer with a chat template, and a conversation for it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from megatron.data.preprocessing.bpe import train_bpe

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "who are the people?"},
    {"role": "assistant", "content": "we are the people 😀"},
    {"role": "user", "content": "of what?"},
    {"role": "assistant", "content": "of the united states"},
]


def make_chat_model(folder: Path, template: str | None, eos: str | None) -> Path:
    """`folder` with a tokenizer and, where they are not None, a chat template and an end-of-sequence token."""
    folder.mkdir(exist_ok=True)
    words = "we are the people of the united states: who are the people? of what? assistant user system be brief "
    train_bpe([words * 3], 400, folder / "t.json")
    tokenizer = Tokenizer.from_file(str(folder / "t.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder
