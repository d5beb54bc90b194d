"""Many requests, large ones, slow ones, clients that leave, a model that fails: a clear error or a queue, no crash, no wrong token."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import psutil
import pytest
from torch import Tensor

from megatron.inference.routing_trace import RoutingTrace
from megatron.inference.runner import ModuleRunner, TextState
from megatron.inference.serve import server as server_module
from tests.inference.conftest import argmax_without_cache
from tests.inference.serve.conftest import Served, served, wait_until

CLIENTS = 200
SOON = 150
"""Tokens: `slow` needs 3 seconds for them, or longer where others use the machine. Of the 240 that were asked for, a text must not get so many."""
BODY_BYTES = 100 * 2**20


def body(prompt: str, **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, **options}


def expected(running: Served, prompt: str, count: int = 6) -> str:
    tokenizer = running.ready.tokenizer
    return tokenizer.decode(argmax_without_cache(running.ready, tokenizer.encode(prompt), count))


def all_at_once(running: Served, prompts: Sequence[str], tokens: int = 3) -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=len(prompts))
        async with httpx.AsyncClient(base_url=running.url, limits=limits, timeout=120) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body(prompt, max_tokens=tokens)) for prompt in prompts))

    return asyncio.run(ask())


def test_two_hundred_clients_at_once_wait_and_get_their_own_tokens() -> None:
    prompts = [f"Speech {number:3} to the Congress"[: 5 + number % 20] + str(number) for number in range(CLIENTS)]
    with served() as running:
        answers = all_at_once(running, prompts)
        assert [answer.status_code for answer in answers] == [200] * CLIENTS
        texts = [answer.json()["choices"][0]["text"] for answer in answers]
        assert texts == [expected(running, prompt, 3) for prompt in prompts]
        counters = httpx.get(f"{running.url}/metrics").json()
        assert counters["requests"] == counters["texts_ended_by_length"] == CLIENTS
        assert counters["tokens_generated"] == 3 * CLIENTS
        assert counters["tokens_in_prompts"] == sum(map(len, prompts))
        assert counters["texts_in_work_or_waiting"] == 0


def test_who_does_not_fit_into_the_queue_is_told() -> None:
    prompts = [f"{number} and so on" for number in range(CLIENTS)]
    with served(max_running=2, max_waiting=4) as running:
        answers = all_at_once(running, prompts)
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == expected(running, prompt, 3)
            else:
                error = answer.json()["error"]
                assert "texts run or wait, and it takes 6. Try again later." in error["message"]
                assert (error["type"], error["code"], answer.headers["retry-after"]) == ("rate_limit_error", "queue_full", "1")
        assert httpx.get(f"{running.url}/metrics").json()["requests_refused"] == statuses.count(429)
        with running.client() as client, pytest.raises(openai.BadRequestError, match="asks for 7 texts, and this server takes at most 6 at a time"):
            client.completions.create(model="tiny", prompt="x", n=7)
        many = running.post("/v1/completions", body(["x"] * 500_000))  # type: ignore[arg-type]
        assert "asks for 500,000 texts" in many.json()["error"]["message"]


def large_body() -> Iterator[bytes]:
    start = b'{"model": "tiny", "max_tokens": 2, "prompt": "'
    yield start
    for _ in range(BODY_BYTES // 2**20):
        yield b"a" * 2**20
    yield b'"}'


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_body_is_refused_and_not_kept(here: Served, announced: bool) -> None:
    size = sum(map(len, large_body()))
    headers = {"content-type": "application/json", **({"content-length": str(size)} if announced else {})}
    before = psutil.Process().memory_info().rss
    answer = httpx.post(f"{here.url}/v1/completions", content=large_body(), headers=headers, timeout=60)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "The body is larger than this server takes (4,194,304 bytes)."
    assert psutil.Process().memory_info().rss - before < BODY_BYTES // 2
    assert here.post("/v1/completions", body("Hello")).json()["choices"][0]["text"] == expected(here, "Hello")


def test_the_openai_client_understands_a_large_body(here: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="larger than this server takes") as refused:
        client.completions.create(model="tiny", prompt="a" * (8 * 2**20))
    assert refused.value.status_code == 413


def test_a_large_prompt_in_a_body_of_the_right_size_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt has 4,000,000"):
        client.completions.create(model="tiny", prompt="a" * 4_000_000)


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with served(body_seconds=0.2) as running, socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as connection:
        connection.settimeout(20)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nContent-Type: application/json\r\n\r\n{")
        received = b"".join(iter(lambda: connection.recv(65536), b""))  # headers and body may come one after the other
        assert b" 408 " in received
        assert b"The body of the request did not come within 0.2 seconds." in received


class SlowRunner(ModuleRunner):
    """50 tokens a second at most."""

    def decode(self, states: Sequence[TextState], tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        time.sleep(0.02)
        return super().decode(states, tokens, trace)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(server_module, "build_runner", SlowRunner)
    with served(max_running=1) as running:
        yield running


def test_a_client_that_leaves_a_stream_ends_its_text(slow: Served) -> None:
    with httpx.stream("POST", f"{slow.url}/v1/completions", json=body("Hello", max_tokens=240, stream=True)) as answer:
        lines = answer.iter_lines()
        first = [next(lines) for _ in range(4)]
    assert first[0].startswith("data: {")
    wait_until(lambda: slow.worker.admitted == 0)
    assert slow.post("/v1/completions", body("Next")).json()["choices"][0]["text"] == expected(slow, "Next")
    assert slow.worker.counts["tokens_generated"] < SOON
    assert slow.worker.counts["requests_cancelled"] == 1
    assert slow.worker.counts["texts_ended_by_length"] == 1


def test_a_client_that_stops_waiting_ends_its_texts(slow: Served) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{slow.url}/v1/completions", json=body("Hello", max_tokens=240, n=3), timeout=0.5)
    wait_until(lambda: slow.worker.admitted == 0)
    assert slow.post("/v1/completions", body("Next")).json()["choices"][0]["text"] == expected(slow, "Next")
    assert slow.worker.counts["tokens_generated"] < SOON
    assert slow.worker.counts["requests_cancelled"] == 1


def test_several_requests_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    begun: list[Served] = []

    class Watched(SlowRunner):
        def decode(self, states: Sequence[TextState], tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
            wait_until(lambda: begun[0].worker.counts["requests"] == 8)  # no text is over before the last one has come
            sizes.append(len(states))
            return super().decode(states, tokens, trace)

    monkeypatch.setattr(server_module, "build_runner", Watched)
    with served(max_running=4) as running:
        begun.append(running)
        all_at_once(running, [f"text {number}" for number in range(8)], tokens=12)
    assert max(sizes) == 4


class FailingRunner(ModuleRunner):
    """Fails at every prompt of four tokens, with the exception that its first token asks for."""

    def prefill(self, state: TextState, tokens: Sequence[int], trace: RoutingTrace | None = None) -> Tensor:
        if len(tokens) == 4:
            raise {ord("V"): ValueError("The expert file is gone."), ord("R"): RuntimeError("a bug")}[tokens[0]]
        return super().prefill(state, tokens, trace)


@pytest.mark.parametrize(("prompt", "message"), [("Void", "The expert file is gone."), ("Rest", "The server made a mistake with this request.")])
def test_a_failure_of_the_model_is_an_error_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch, prompt: str, message: str) -> None:
    monkeypatch.setattr(server_module, "build_runner", FailingRunner)
    with served() as running, running.client() as client:
        with pytest.raises(openai.InternalServerError, match=message):
            client.completions.create(model="tiny", prompt=prompt, max_tokens=3)
        with pytest.raises(openai.APIError, match=message):
            list(client.completions.create(model="tiny", prompt=prompt, max_tokens=3, stream=True))
        assert client.completions.create(model="tiny", prompt="Hello", max_tokens=6, temperature=0).choices[0].text == expected(running, "Hello")
        assert running.worker.admitted == 0
        counters = httpx.get(f"{running.url}/metrics").json()
        assert (counters["requests_failed"], counters.get("requests_cancelled", 0)) == (2, 0)


def test_stopping_lets_running_texts_finish_and_refuses_new_ones(slow: Served) -> None:
    with httpx.stream("POST", f"{slow.url}/v1/completions", json=body("Hello", max_tokens=60, stream=True), timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        slow.server.should_exit = True
        wait_until(lambda: not slow.worker.is_alive)
        with pytest.raises(httpx.TransportError):
            slow.post("/v1/completions", body("too late"))
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_what_does_not_finish_in_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "build_runner", SlowRunner)
    with served(shutdown_seconds=0.3) as running, running.client() as client:
        stream = client.completions.create(model="tiny", prompt="Hello", max_tokens=240, stream=True)
        next(iter(stream))
        running.server.should_exit = True
        with pytest.raises(openai.APIError, match="The server is shutting down"):
            list(stream)


def test_a_second_interrupt_does_not_wait(slow: Served) -> None:
    with slow.client() as client:
        stream = iter(client.completions.create(model="tiny", prompt="Hello", max_tokens=240, stream=True))
        next(stream)
        slow.server.handle_exit(signal.SIGINT, None)
        slow.server.handle_exit(signal.SIGINT, None)
        slow.thread.join(60)
        assert not slow.thread.is_alive()
        assert slow.worker.counts["tokens_generated"] < SOON
