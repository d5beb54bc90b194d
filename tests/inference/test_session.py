"""generate.py's work without the process around it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron.config import config_from_dict
from megatron.config.section import ConfigError
from megatron.inference.continuation import Continuation
from megatron.inference.engine import Engine, Event
from megatron.inference.errors import InferenceError
from megatron.inference.samples import SampleFile, printable
from megatron.inference.session import generate


def run(keys: dict[str, Any], read_line: Callable[[str], str] | None = None, **changes: Any) -> str:
    """What appears on the screen."""

    def nobody(_: str) -> str:
        raise AssertionError("nobody is there to ask")

    console = Console(file=io.StringIO(), width=200)
    generate(config_from_dict({**keys, **changes}), console, read_line or nobody, terminal=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def typing(*lines: str | type[BaseException]) -> Callable[[str], str]:
    remaining = iter([*lines, EOFError])

    def read_line(_: str) -> str:
        line = next(remaining)
        if isinstance(line, str):
            return line
        raise line

    return read_line


@pytest.fixture
def keys(checkpoint: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("Fellow citizens\nThe Union\nFellow citizens\n")
    return {**checkpoint, "sample_output_file": str(tmp_path / "samples.jsonl"), "maximum_tokens": 8}


def samples(keys: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(keys["sample_output_file"]).read_text().splitlines()]


def from_file(keys: dict[str, Any], tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    run(keys, sample_input_file=str(tmp_path / "prompts.txt"), **changes)
    return samples(keys)


def without_time(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "duration_seconds"} for entry in entries]


def test_a_line_for_each_prompt_with_neox_keys(keys: dict[str, Any], tmp_path: Path) -> None:
    entries = from_file(keys, tmp_path)
    assert [entry["context"] for entry in entries] == ["Fellow citizens", "The Union", "Fellow citizens"]
    assert all(list(entry) == ["context", "text", "length", "finished", "message", "duration_seconds", "finish_reason"] for entry in entries)


def test_greedy_answers_depend_on_their_prompt_alone(keys: dict[str, Any], tmp_path: Path) -> None:
    first, second, third = without_time(from_file(keys, tmp_path))
    assert first == third != second


def test_seeds_reproduce_and_samples_differ(keys: dict[str, Any], tmp_path: Path) -> None:
    first = without_time(from_file(keys, tmp_path, temperature=1.0))
    assert without_time(from_file(keys, tmp_path, temperature=1.0)) == first
    assert first[0]["text"] != first[2]["text"]
    assert without_time(from_file(keys, tmp_path, temperature=1.0, seed=99)) != first
    assert without_time(from_file(keys, tmp_path, temperature=1.0, seed=99, sample_seed=1234)) == first  # seed is 1234 by default


def test_num_samples_of_each_prompt(keys: dict[str, Any], tmp_path: Path) -> None:
    entries = from_file(keys, tmp_path, num_samples=2, temperature=1.0)
    assert [entry["context"] for entry in entries] == ["Fellow citizens"] * 2 + ["The Union"] * 2 + ["Fellow citizens"] * 2
    assert entries[0]["text"] != entries[1]["text"]


def test_the_settings_of_the_sampling_act(keys: dict[str, Any], tmp_path: Path) -> None:
    plain = from_file(keys, tmp_path, temperature=1.0)[0]["text"]
    narrow = from_file(keys, tmp_path, temperature=1.0, min_p=0.999)[0]["text"]
    assert narrow == from_file(keys, tmp_path)[0]["text"] != plain, "only the most likely token has as much as itself"
    assert from_file(keys, tmp_path, repetition_penalty=5.0)[0]["text"] != narrow


def test_stop_strings_end_the_texts(keys: dict[str, Any], tmp_path: Path) -> None:
    whole = from_file(keys, tmp_path, maximum_tokens=20)[1]["text"]
    stop = whole[-2:]
    stopped = from_file(keys, tmp_path, maximum_tokens=20, stop_strings=["nowhere", stop])[1]
    assert (stopped["text"], stopped["finished"], stopped["finish_reason"]) == (whole[: whole.index(stop)], True, "stop")
    with pytest.raises(ConfigError, match=r"'stop_strings' = .*: has an empty string: leave it out, or no text could begin"):
        run(keys, stop_strings=["a", ""])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_the_same_however_many_are_made_at_once(keys: dict[str, Any], tmp_path: Path, temperature: float) -> None:
    chosen = {"temperature": temperature, "num_samples": 3}
    alone = without_time(from_file(keys, tmp_path, sample_batch_size=1, **chosen))
    assert len(alone) == 9
    assert without_time(from_file(keys, tmp_path, sample_batch_size=4, **chosen)) == alone


def test_unconditional(keys: dict[str, Any]) -> None:
    screen = run(keys, num_samples=3, temperature=1.0)
    assert [entry["context"] for entry in samples(keys)] == ["", "", ""]
    assert [f"[{number}/3]" in screen for number in (1, 2, 3, 4)] == [True, True, True, False]


def test_the_screen_shows_prompt_answer_and_ending(keys: dict[str, Any], tmp_path: Path) -> None:
    screen = run(keys, sample_input_file=str(tmp_path / "prompts.txt"))
    entry = samples(keys)[1]
    assert f"[2/3] {entry['length']} tokens" in screen
    assert "The Union" + printable(entry["text"]) in screen


def test_the_samples_file_is_named(keys: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    with caplog.at_level(logging.INFO, "megatron"):
        run(keys)
    assert f"1 sample(s) written to {keys['sample_output_file']}." in caplog.messages


def test_filters_without_a_temperature_are_pointed_out(
    keys: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("megatron"), "handlers", [])  # what a run in this process has left there would tell it twice
    with caplog.at_level(logging.WARNING, "megatron"):
        run(keys, top_k=5)
        run(keys, top_k=5, min_p=0.1)
        run(keys, temperature=1.0, top_k=5, min_p=0.1)
    assert caplog.messages == [
        "temperature is 0, so the most likely token is always taken: top_k has no effect. Add -o temperature=1.0 to sample.",
        "temperature is 0, so the most likely token is always taken: top_k and min_p have no effect. Add -o temperature=1.0 to sample.",
    ]


def test_prompts_that_are_not_read_are_pointed_out(
    keys: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPT-NeoX's text_generation.yml has it: a file of prompts, and unconditional."""
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("megatron"), "handlers", [])
    with caplog.at_level(logging.WARNING, "megatron"):
        run(keys, sample_input_file="prompts.txt", text_gen_type="unconditional")
    assert caplog.messages == ["sample_input_file prompts.txt is not read, because text_gen_type is unconditional."]


def test_ctrl_c_keeps_every_sample_that_is_finished(keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that waits for the sample of an earlier prompt."""
    (tmp_path / "prompts.txt").write_text(f"a\n{'x' * 31}\nb\n")
    step, steps = Engine.step, iter(range(7))

    def interrupted(engine: Engine) -> list[Event]:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        from_file(keys, tmp_path, maximum_tokens=25)
    assert [(entry["context"], entry["length"]) for entry in samples(keys)] == [("x" * 31, 1)]


def test_an_unwritable_file_is_named_before_anything_is_generated(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match=r"sample_output_file: .*missing/samples\.jsonl cannot be written: No such file or directory"):
        run(keys, sample_output_file=str(tmp_path / "missing" / "samples.jsonl"))


def test_a_full_disk_is_a_sentence() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(InferenceError, match="/dev/full cannot be written: No space left on device"), SampleFile(Path("/dev/full")) as file:
        file.write(Continuation("a", "b", 1, False, None, 0.1, "length"))


def test_a_bad_prompt_file_is_found_before_the_model_is_loaded(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match=r"none\.txt cannot be read"):
        run(keys, load="nowhere", sample_input_file=str(tmp_path / "none.txt"))


def test_a_conversation(keys: dict[str, Any], tmp_path: Path) -> None:
    """The second answer is what the file gives for the same prompt: nothing of the first one is left."""
    answer = from_file(keys, tmp_path)[1]["text"]
    screen = run(keys, typing("Something else", "The Union", "/quit"), text_gen_type="interactive")
    assert screen.startswith("Write a prompt; /quit, Ctrl-D or Ctrl-C to end.\n")
    assert screen.endswith(f"\n{printable(answer)}\nBye.\n")


@pytest.mark.parametrize("ending", [EOFError, KeyboardInterrupt, "/quit"])
def test_a_conversation_ends_politely(keys: dict[str, Any], ending: Any) -> None:
    assert run(keys, typing("The Union", ending), text_gen_type="interactive").endswith("\nBye.\n")


def test_ctrl_c_during_an_answer_ends_it_too(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron.inference.session.complete", interrupted)
    assert run(keys, typing("The Union"), text_gen_type="interactive").endswith("\nBye.\n")


def test_a_conversation_says_when_the_context_is_full(keys: dict[str, Any]) -> None:
    screen = run(keys, typing("x" * 40), text_gen_type="interactive")
    assert "(the prompt has 40 tokens and the model's context 32 (seq_length): there is no room for an answer)" in screen


def test_another_prompt_end_is_explained(keys: dict[str, Any]) -> None:
    assert "Write a prompt, end it with '###'; /quit" in run(keys, typing(), text_gen_type="interactive", prompt_end="###")


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31m\r\x07é\u00a0\n\tb\x9b") == "a\ufffd[31m\ufffd\ufffdé\u00a0\n\tb\ufffd"
