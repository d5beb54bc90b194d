"""tools/serve.py as a process: how it starts, what it says, how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from megatron.inference.errors import InferenceError
from megatron.inference.serve.server import is_loopback, listen, read_key
from megatron.monitor.routing_trace import read_trace
from tests.inference.serve.conftest import settings, wait_until
from tests.scripts import ScriptProcess, run_script
from tests.training.runs import outer_environment

Write = Callable[[Mapping[str, Any]], Path]
Start = Callable[..., tuple[ScriptProcess, str]]


@pytest.fixture
def environment(repository: Path) -> dict[str, str]:
    return {**outer_environment(), "PYTHONPATH": str(repository), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path: Path, checkpoint: dict[str, Any], yaml_file: Write, environment: dict[str, str]) -> Iterator[Start]:
    """Starts the server on a free port and gives its process and address."""
    begun: list[ScriptProcess] = []

    def begin(*words: str, **keys: Any) -> tuple[ScriptProcess, str]:
        path = yaml_file({**checkpoint, "serve_port": 0, **keys})
        process = ScriptProcess("tools/serve.py", str(path), *words, folder=tmp_path, environment=environment)
        begun.append(process)
        log = process.outputs[0]
        wait_until(lambda: process.returncode is not None or (log.exists() and "Serving" in log.read_text()), 120)
        address = re.search(r"Serving '\w+' on (http://\S+) ", log.read_text())
        assert address is not None, process.communicate(10)
        return process, address[1]

    yield begin
    for process in begun:
        process.kill()


def test_it_serves_a_checkpoint_and_ends_in_order(start: Start, checkpoint: dict[str, Any]) -> None:
    process, url = start()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        assert client.models.list().data[0].id == "run"
        stream = client.completions.create(model="run", prompt="Hello", max_tokens=20, temperature=0, stream=True)
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
    output, error = process.communicate(60)
    assert process.returncode == 0, error
    assert [first, *rest][-1].choices[0].finish_reason in ("length", "stop")
    assert f"{checkpoint['load']}/global_step2, step 2, float32 on cpu." in output
    assert "Chat is not available, because the tokenizer has no chat template. Ctrl-C stops it." in output
    assert "Stopped. 1 requests," in output
    assert error == ""


def test_what_moved_is_counted_and_recorded_at_the_end(start: Start, tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("counters.json", "trace.npz")}
    process, url = start(expert_offload={"slots": 3, "counters": files["counters.json"], "record": files["trace.npz"]})
    answer = httpx.post(f"{url}/v1/completions", json={"model": "run", "prompt": "Hello", "max_tokens": 4, "temperature": 0}, timeout=60)
    assert answer.status_code == 200
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(60)
    assert (process.returncode, error) == (0, "")
    assert "hit rate" in output
    assert json.loads(Path(files["counters.json"]).read_text())["total"]["selections"] > 0
    assert read_trace(Path(files["trace.npz"])).tokens >= len("Hello")


def test_ctrl_c_ends_it_too(start: Start) -> None:
    process, url = start(serve_model_name="mine")
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "mine"
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(60)
    assert (process.returncode, error) == (0, "")
    assert "Stopped. 0 requests, 0 tokens generated." in output


def test_other_machines_are_a_warning(start: Start) -> None:
    process, _ = start(serve_host="0.0.0.0")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(60)
    assert "serve_host = 0.0.0.0: anyone who can reach this machine can use the model. The connection is not encrypted." in output
    assert "Set serve_api_key_file to ask for a key." in output


def test_a_busy_port_is_a_sentence_before_the_model_is_loaded(
    tmp_path: Path, checkpoint: dict[str, Any], yaml_file: Write, environment: dict[str, str]
) -> None:
    (tmp_path / "tools").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = yaml_file({**checkpoint, "load": str(tmp_path / "nowhere"), "serve_port": port})
        finished = run_script("tools/serve.py", str(path), folder=tmp_path, environment=environment, timeout=120)
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"The server cannot listen on 127.0.0.1, port {port}: ")
    assert "Address already in use. Give another address or port (serve_host, serve_port)." in finished.stderr


def test_an_address_of_elsewhere_is_a_sentence() -> None:
    with pytest.raises(InferenceError, match=r"The server cannot listen on 192\.0\.2\.1, port 0: Cannot assign requested address"):
        listen(settings(host="192.0.2.1", port=0))
    with pytest.raises(InferenceError, match=r"serve_host = no such host: this is no address of this machine"):
        listen(settings(host="no such host", port=0))


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)])
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_key_is_the_first_line(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret \nsecond line\n")
    assert read_key(settings(api_key_file=str(file))) == "secret"
    assert read_key(settings()) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\n", "must be the key"),
        ("schlüssel".encode(), "of ASCII characters"),
        (b"\xff", "not UTF-8 text"),
    ],
)
def test_a_key_file_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InferenceError, match=f"serve_api_key_file: .*{message}"):
        read_key(settings(api_key_file=str(file)))


def test_a_second_process_of_a_launch_has_nothing_to_do(
    tmp_path: Path, checkpoint: dict[str, Any], yaml_file: Write, environment: dict[str, str]
) -> None:
    (tmp_path / "tools").mkdir()
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    finished = run_script("tools/serve.py", str(yaml_file(checkpoint)), folder=tmp_path, environment=environment | place, timeout=120)
    assert (finished.returncode, finished.stdout) == (0, "")
