"""Every wrong request gets a status and a sentence in OpenAI's form, and the server goes on."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.inference.serve.conftest import Served, served

BASE = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("completions", {"temperature": 3}, "temperature", "'temperature' = 3: must be less than or equal to 2."),
    ("completions", {"temperature": "hot"}, "temperature", "'temperature' = 'hot': must be a valid number."),
    ("completions", {"top_p": 0}, "top_p", "'top_p' = 0: must be greater than 0."),
    ("completions", {"n": 0}, "n", "'n' = 0: must be greater than or equal to 1."),
    ("completions", {"n": 129}, "n", "'n' = 129: must be less than or equal to 128."),
    ("completions", {"max_tokens": 0}, "max_tokens", "'max_tokens' = 0: must be greater than or equal to 1."),
    ("completions", {"max_tokens": 2.5}, "max_tokens", "'max_tokens' = 2.5: must be a valid integer."),
    ("completions", {"stream": 1}, "stream", "'stream' = 1: must be a valid boolean."),
    ("completions", {"stop": [""]}, "stop", "'stop' = ['']: must be a string or a list of at most 16 strings that are not empty."),
    ("completions", {"stop": ["x"] * 17}, "stop", "must be a string or a list of at most 16 strings that are not empty."),
    ("completions", {"prompt": []}, "prompt", "'prompt' = []: must be a string, a list of strings, a list of token numbers, or a list of such lists"),
    ("completions", {"prompt": [[]]}, "prompt", "must be a string, a list of strings"),
    ("completions", {"prompt": {"text": "x"}}, "prompt", "must be a string, a list of strings"),
    ("completions", {"prompt": [1, 512]}, "prompt", "The prompt has the token 512: the tokenizer has tokens from 0 to 511."),
    ("completions", {"prompt": "half \ud83d"}, "prompt", r"'prompt' = 'half \ud83d': has half a character in it (a lone surrogate such as \ud83d)."),
    ("completions", {"prompt": ["whole", "half \ud83d"]}, "prompt", "has half a character in it"),
    ("completions", {"model": "half \ud83d"}, "model", r"'model' = 'half \ud83d': has half a character in it"),
    ("completions", {"prompt": ""}, "prompt", "no end-of-document token"),
    ("completions", {"temprature": 1}, "temprature", "Unknown field 'temprature'; did you mean 'temperature'?"),
    ("completions", {"messages": []}, "messages", "Unknown field 'messages'"),
    ("completions", {"best_of": 2}, None, "'best_of' = 2 is not supported by this server: it must equal n (1), or be left out."),
    ("completions", {"suffix": "end"}, None, "'suffix' is not supported by this server; leave it out."),
    ("completions", {"logit_bias": {"5": 1}}, None, "'logit_bias' is not supported by this server; leave it out."),
    ("completions", {"echo": True, "logprobs": 1}, None, "'echo' cannot be combined with logprobs"),
    ("completions", {"logprobs": 21}, "logprobs", "'logprobs' = 21: must be less than or equal to 20."),
    ("completions", {"stream_options": {"include_usage": True}}, None, "'stream_options' needs stream: true."),
    ("completions", {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unknown field 'stream_options.x'."),
    ("completions", {"presence_penalty": 2.5}, "presence_penalty", "'presence_penalty' = 2.5: must be less than or equal to 2."),
    ("chat/completions", {"messages": []}, "messages", "'messages' = []: must have at least 1 item."),
    ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'messages[0].role' = 'king': must be 'system'"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "The field 'messages[0].content' is missing."),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "this server reads text only"),
    ("chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content", "has half a character in it"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "name": "\ud83d"}]}, "messages[0].name", "has half a character in it"),
    ("chat/completions", {"tools": [{"type": "function"}]}, None, "'tools' is not supported by this server; leave it out."),
    ("chat/completions", {"response_format": {"type": "json_object"}}, None, "'response_format' is not supported by this server"),
    ("chat/completions", {"top_logprobs": 2}, None, "'top_logprobs' needs logprobs: true."),
    ("chat/completions", {"max_completion_tokens": 5}, None, "'max_tokens' and 'max_completion_tokens' differ; give one of them."),
]


@pytest.mark.parametrize(("path", "change", "param", "message"), REFUSED)
def test_a_wrong_field_is_a_sentence(here: Served, path: str, change: dict[str, Any], param: str | None, message: str) -> None:
    answer = here.post(f"/v1/{path}", {**(BASE if path == "completions" else CHAT), **change})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"], set(error)) == ("invalid_request_error", param, {"message", "type", "param", "code"})


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "me", "suffix": None, "logit_bias": {}, "best_of": 1, "n": None, "stop": None, "seed": None, "logprobs": None},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "temperature": 0, "top_p": 1, "echo": False, "stream": False},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(here: Served, harmless: dict[str, Any]) -> None:
    assert here.post("/v1/completions", {**BASE, **harmless}).status_code == 200


def test_a_prompt_must_fit_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context is 256 tokens, and the prompt has 256") as refused:
        client.completions.create(model="tiny", prompt="a" * 256)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="The prompt has 250, so max_tokens can be at most 6, and it is 7"):
        client.completions.create(model="tiny", prompt="a" * 250, max_tokens=7)


def test_another_model_is_not_here(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"The model 'gpt-4' is not here\. This server has 'tiny'\."):
        client.completions.create(model="gpt-4", prompt="Hello")
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not here"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/v1/completions", b"{", 400, "The body is not JSON: "),
        ("POST", "/v1/completions", b"[1]", 400, "The body must be a JSON object."),
        ("POST", "/v1/completions", b"", 400, "The request has no body, and it needs one: a JSON object."),
        ("POST", "/v1/completions", b'{"model": "tiny"}', 400, "The field 'prompt' is missing."),
        ("GET", "/v1/completions", b"", 405, "GET is not what /v1/completions takes."),
        ("POST", "/v1/embeddings", b"{}", 404, "There is no /v1/embeddings here."),
        ("GET", "/docs", b"", 404, "There is no /docs here."),
    ],
)
def test_what_is_no_request(here: Served, method: str, path: str, content: bytes, status: int, message: str) -> None:
    answer = httpx.request(method, here.url + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_page_of_another_site_gets_nothing(here: Served) -> None:
    """A browser sends JSON to another site only if that site agrees first; and a name that leads here does not make a page ours."""
    plain = httpx.post(f"{here.url}/v1/completions", content=b'{"model": "tiny", "prompt": "x"}', headers={"content-type": "text/plain"})
    assert plain.status_code == 400
    asked = httpx.options(f"{here.url}/v1/completions", headers={"origin": "http://evil.example", "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in asked.headers
    renamed = httpx.get(f"{here.url}/v1/models", headers={"host": "evil.example:8000"})
    assert renamed.status_code == 403
    assert "under the names 127.0.0.1, [::1], localhost; not as 'evil.example:8000'" in renamed.json()["error"]["message"]


def test_a_key_is_asked_for() -> None:
    with served(key="secret") as running:
        with running.client(api_key="secret") as client:
            assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
        with running.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError, match="The key of this request is wrong"):
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert "needs a key" in httpx.get(f"{running.url}/v1/models").json()["error"]["message"]
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{running.url}/").status_code == 200


def test_a_server_may_take_shorter_prompts_only() -> None:
    with served(max_prompt_tokens=10) as running:
        assert running.post("/v1/completions", {**BASE, "prompt": "a" * 10}).status_code == 200
        answer = running.post("/v1/completions", {**BASE, "prompt": "a" * 11})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert answer.json()["error"]["message"] == "The prompt has 11 tokens, and this server takes at most 10. Give a shorter one."
