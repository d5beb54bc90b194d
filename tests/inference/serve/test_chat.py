"""/v1/chat/completions through the real `openai` client: the template's text is what the model reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from megatron.inference.serve.chat import find_template
from megatron.inference.serve.errors import ApiError
from tests.inference.conftest import argmax_without_cache
from tests.inference.serve.conftest import TEMPLATE, Served

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
RENDERED = "[system] Be brief.\n[user] Who are you?\n[assistant] "


def expected_answer(chat_here: Served, count: int) -> tuple[str, bool]:
    """(the greedy answer by its definition, whether the model ended it)."""
    ready = chat_here.ready
    tokens = argmax_without_cache(ready, ready.tokenizer.encode(RENDERED), count)
    end = ready.tokenizer.eod
    return ready.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens), end in tokens


def test_the_model_reads_the_rendered_conversation(chat_here: Served) -> None:
    text, ended = expected_answer(chat_here, 12)
    with chat_here.client() as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert choice.finish_reason == ("stop" if ended else "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(RENDERED)
    assert answer.object == "chat.completion"


def test_a_stream_begins_with_the_role(chat_here: Served) -> None:
    with chat_here.client() as client:
        parts = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=12, temperature=0, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected_answer(chat_here, 12)[0]
    assert {part.object for part in parts} == {"chat.completion.chunk"}
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


def test_parts_of_a_message_are_one_text(chat_here: Served) -> None:
    parts: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]},
    ]
    with chat_here.client() as client:
        answer = client.chat.completions.create(model="tiny", messages=parts, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == expected_answer(chat_here, 5)[0]


def test_log_probabilities_have_the_chat_form(chat_here: Served) -> None:
    with chat_here.client() as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2, n=2)
    for choice in answer.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert "".join(entry.token for entry in content) == choice.message.content
        assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob for entry in content)
        assert all(entry.logprob == entry.top_logprobs[0].logprob and bytes(entry.bytes or []).decode() == entry.token for entry in content)


def test_what_the_template_refuses_is_a_sentence(chat_here: Served) -> None:
    with chat_here.client() as client, pytest.raises(openai.BadRequestError, match="chat template refuses this conversation: no developers here"):
        client.chat.completions.create(model="tiny", messages=[{"role": "developer", "content": "x"}])


def test_without_a_template_there_is_no_chat(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"tokenizer has no chat template.*Use /v1/completions"):
        client.chat.completions.create(model="tiny", messages=MESSAGES)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"chat_template.jinja": TEMPLATE}, TEMPLATE),
        ({"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE})}, TEMPLATE),
        ({"chat_template.json": json.dumps({"chat_template": TEMPLATE})}, TEMPLATE),
        (
            {"tokenizer_config.json": json.dumps({"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]})},
            TEMPLATE,
        ),
        ({"chat_template.jinja": TEMPLATE, "tokenizer_config.json": json.dumps({"chat_template": "older"})}, TEMPLATE),
        ({"tokenizer_config.json": "not JSON"}, None),
    ],
)
def test_where_a_template_is_found(tmp_path: Path, files: dict[str, str], found: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    template = find_template(tmp_path)
    assert (None if template is None else template.text) == found
    assert find_template(None) is None


def test_a_template_may_name_the_tokenizer_s_tokens(tmp_path: Path) -> None:
    settings = {"chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    template = find_template(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hello"}]) == "<s>hello</s>"


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    template = find_template(tmp_path)
    assert template is not None
    with pytest.raises(ApiError, match="refuses this conversation"):
        template.render([{"role": "user", "content": "hello"}])
