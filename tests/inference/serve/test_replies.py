"""The JSON of answers where a client could be misled: parts of characters, impossible tokens, the token that ends a text."""

from __future__ import annotations

import json
import math

from megatron.data.tokenizer.character import CharLevelTokenizer
from megatron.inference.engine import Event
from megatron.inference.serve.prompts import Prompt
from megatron.inference.serve.replies import Choice, Heading, usage


def choice(kind: str = "chat.completion") -> Choice:
    return Choice(Heading("tiny", kind), 0, Prompt("Hi", [72, 105]), CharLevelTokenizer(), frozenset({0}))


def test_bytes_of_a_part_of_a_character_are_not_invented() -> None:
    first, second = "é".encode()
    answer = choice()
    answer.add(Event(0, first, "", None, logprob=-1.0, alternatives=((65, -0.5),)))
    answer.add(Event(0, second, "é", "length", logprob=-math.inf))
    content = answer.whole(echo=False)["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [None, None]
    assert content[0]["top_logprobs"] == [{"token": "A", "logprob": -0.5, "bytes": [65]}]
    assert content[1]["logprob"] == -9999.0
    json.dumps(answer.whole(echo=False), allow_nan=False)


def test_the_token_that_ends_a_text_counts_and_is_not_shown() -> None:
    answer = choice("text_completion")
    assert answer.add(Event(0, 65, "A", None, logprob=-1.0)) is not None
    last = answer.add(Event(0, 0, "", "stop", logprob=-2.0))
    assert last == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    assert answer.whole(echo=True)["text"] == "HiA"
    assert answer.whole(echo=True)["logprobs"]["tokens"] == ["A"]
    assert usage([answer.prompt], [answer]) == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def test_a_full_context_is_openai_s_length() -> None:
    answer = choice()
    part = answer.add(Event(0, finish_reason="context", message="full"))
    assert part is not None
    assert part["finish_reason"] == "length"


def test_an_event_without_anything_to_show_is_no_part() -> None:
    assert choice().add(Event(0, 0xC3)) is None
