"""What these tests share: a tiny model behind a real server on a port of its own, and the real `openai` client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from megatron.config.serve import ServeConfig
from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.inference.model import ReadyModel
from megatron.inference.serve.app import Service, build_app
from megatron.inference.serve.limits import Limited
from megatron.inference.serve.server import OrderlyServer, build_service, guard_of, listen
from megatron.inference.serve.worker import EngineWorker
from tests.inference.conftest import build_ready, lively_config

TEMPLATE = "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"  # noqa: E501
LONG = {"seq_length": 256, "max_position_embeddings": 256}


class LetterTokenizer(CharLevelTokenizer):
    """Every token is one character, also those that are half a character in UTF-8. Texts have no end."""

    eod = None  # type: ignore[assignment]

    def encode(self, text: str) -> list[int]:
        return [number - 0x400 if number >= 0x400 else number for number in map(ord, text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(number if number < 128 else 0x400 + number) for number in ids)


class EndingTokenizer(LetterTokenizer):
    """Texts have an end, which is no text."""

    eod = 0  # type: ignore[assignment]

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([number for number in ids if number != self.eod])


@dataclass
class Served:
    """A server that runs in a thread of this process."""

    url: str
    service: Service
    worker: EngineWorker
    server: OrderlyServer
    thread: threading.Thread

    @property
    def ready(self) -> ReadyModel:
        return self.service.ready

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        content = json.dumps(body)  # httpx would send half a character as it is, which cannot be done
        return httpx.post(f"{self.url}{path}", content=content, headers={"content-type": "application/json"}, timeout=60, **options)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextmanager
def served(*, ready: ReadyModel | None = None, key: str | None = None, folder: Path | None = None, **settings: Any) -> Iterator[Served]:
    """A server of `ready`; None: of a tiny StructMoE whose texts never end."""
    keys = {f"serve_{name}": value for name, value in {"port": 0, "model_name": "tiny", "shutdown_seconds": 5.0, **settings}.items()}
    config = lively_config(**LONG, **keys, vocab_file=None if folder is None else str(folder / "vocabulary.txt"))
    ready = ready or build_ready(config, LetterTokenizer())
    service, worker = build_service(config, ready)
    listening = listen(config.serve)
    server = OrderlyServer(Limited(build_app(service), guard_of(config.serve, key)), worker, config.serve, on_start=lambda: None)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    running = Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service, worker, server, thread)
    try:
        yield running
    finally:
        running.stop()
        listening.close()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def settings(**keys: Any) -> ServeConfig:
    return ServeConfig(**{f"serve_{name}": value for name, value in keys.items()})


@pytest.fixture(scope="module")
def here() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def chat_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With a chat template, and with a tokenizer that has an end."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with served(ready=build_ready(lively_config(**LONG), EndingTokenizer()), folder=folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(here: Served) -> Iterator[openai.OpenAI]:
    with here.client() as made:
        yield made
