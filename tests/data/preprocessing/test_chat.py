"""Conversations by a chat template: what is written, what is labelled, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from megatron.data.indexed import DatasetError, IndexedDataset
from megatron.data.preprocessing.chat import ChatTask, chat_job
from megatron.data.preprocessing.preprocess import PreprocessOptions, Summary, preprocess
from megatron.data.progress import LineReporter
from megatron.data.tokenizer import TokenizerError
from tests.data.chat_model import CHAT, CHATML, make_chat_model

# The space before an answer belongs to its first token, so the words that ask for it do not end between two tokens.
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
FORGETFUL = "{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
STRICT = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def chat_model(tmp_path: Path) -> Callable[..., Path]:
    def make(template: str | None = CHATML, eos: str | None = "<|endoftext|>") -> Path:
        return make_chat_model(tmp_path / "model", template, eos)

    return make


def write(tmp_path: Path, *records: Any) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(tmp_path: Path, path: Path, model: Path, **settings: Any) -> Summary:
    keys = settings.pop("keys", ("conversation",))
    common = {name: settings.pop(name) for name in ("on_error", "workers") if name in settings}
    options = PreprocessOptions(inputs=(str(path),), keys=keys, output_prefix=str(tmp_path / "out"), **common)
    reward_key, binary = settings.pop("reward_key", None), settings.pop("binary_reward", False)
    task = ChatTask(tokenizer_path=str(model), rewards=reward_key is not None, **settings)
    return preprocess(chat_job(task, keys, reward_key, binary_reward=binary), options, LineReporter(Console(file=StringIO())))


def documents(prefix: Path) -> list[list[float]]:
    dataset = IndexedDataset(prefix)
    return [dataset.get(number).tolist() for number in range(len(dataset))]


def by_turns(tokenizer: Any, chat: list[dict[str, str]], *, only_last: bool) -> tuple[list[int], list[int]]:
    """GPT-NeoX's way: the conversation is rendered turn after turn, and what is new of the tokens is the turn's."""
    tokens: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(chat):
        last = number == len(chat) - 1
        ask = not last and chat[number + 1]["role"] == "assistant"
        so_far = tokenizer.apply_chat_template(chat[: number + 1], tokenize=True, return_dict=False, add_generation_prompt=ask)
        new = so_far[len(tokens) :]
        tokens += new
        labels += new if turn["role"] == "assistant" and (last or not only_last) else [-100] * len(new)
    end = tokenizer.eos_token_id
    return [*tokens, end], [*labels, end if labels[-1] != -100 else -100]


def test_labels_are_where_turn_by_turn_rendering_puts_them(chat_model: Callable[..., Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = chat_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    chats = [CHAT, CHAT[1:], CHAT[:4], CHAT[1:2], CHAT[2:3], CHAT[2:5], [CHAT[1], CHAT[2], CHAT[4]]]
    path = write(tmp_path, *({"conversation": chat} for chat in chats))
    for last in (False, True):
        run(tmp_path, path, model, only_last=last)
        expected = [by_turns(tokenizer, chat, only_last=last) for chat in chats]
        assert documents(tmp_path / "out_conversation_document") == [tokens for tokens, _ in expected]
        assert documents(tmp_path / "out_conversation_label_document") == [labels for _, labels in expected]
    dataset = IndexedDataset(tmp_path / "out_conversation_label_document")
    assert dataset.dtype == np.dtype("<i4")


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_tokenizer_runs_only_where_it_is_trusted(trusted: bool, chat_model: Callable[..., Path], tmp_path: Path) -> None:
    model, ran = chat_model(), tmp_path / "ran"
    mine = "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast): pass\n"
    (model / "tokenization_mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n{mine}")
    file = model / "tokenizer_config.json"
    changes = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "tokenization_mine.Mine"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    path = write(tmp_path, {"conversation": CHAT})
    if trusted:
        run(tmp_path, path, model, trust_remote_code=True)
    else:
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json names Python code .* add --trust-remote-code"):
            run(tmp_path, path, model)
    assert ran.exists() == trusted


def spoken(model: Path, tokens: list[int], labels: list[int]) -> list[str]:
    """The labelled stretches, as text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    stretches: list[list[int]] = [[]]
    for token, label in zip(tokens, labels, strict=True):
        assert label in (token, -100)
        if label == -100:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return [tokenizer.decode(stretch, skip_special_tokens=False) for stretch in stretches if stretch]


def test_an_answer_whose_first_token_holds_the_space_before_it(chat_model: Callable[..., Path], tmp_path: Path) -> None:
    model = chat_model(PLAIN)
    run(tmp_path, write(tmp_path, {"conversation": CHAT}), model)
    (tokens,), (labels,) = documents(tmp_path / "out_conversation_document"), documents(tmp_path / "out_conversation_label_document")
    assert spoken(model, tokens, labels) == [" we are the people 😀\n", " of the united states\n<|endoftext|>"]


def test_another_role_than_the_one_the_template_asks_for(chat_model: Callable[..., Path], tmp_path: Path) -> None:
    """Its turns are learned with the words that begin them, since nothing else asks for them."""
    model = chat_model()
    run(tmp_path, write(tmp_path, {"conversation": CHAT}), model, generation_role="user")
    (tokens,), (labels,) = documents(tmp_path / "out_conversation_document"), documents(tmp_path / "out_conversation_label_document")
    asked = ["who are the people?", "of what?"]
    assert spoken(model, tokens, labels) == [f"<|im_start|>user\n{words}<|im_end|>\n" for words in asked]


def test_reward_models_and_no_masks(chat_model: Callable[..., Path], tmp_path: Path) -> None:
    model = chat_model()
    path = write(tmp_path, {"conversation": CHAT}, {"conversation": CHAT[1:2]})
    run(tmp_path, path, model, for_rm=True)
    texts, labels = documents(tmp_path / "out_conversation_document"), documents(tmp_path / "out_conversation_label_document")
    assert labels == [[-100] * (len(text) - 1) + [0] for text in texts]
    for file in tmp_path.glob("out*"):
        file.unlink()
    run(tmp_path, path, model, mask=False)
    assert documents(tmp_path / "out_conversation_document") == texts
    assert sorted(file.name for file in tmp_path.glob("out*")) == ["out_conversation_document.bin", "out_conversation_document.idx"]


@pytest.mark.parametrize(
    ("rewards", "binary", "expected", "dtype"),
    [
        ([1, -3, True], False, [[1], [-3], [1]], "<i4"),
        ([1.0, 2.0, 0], False, [[1], [2], [0]], "<i4"),
        ([1, 0.25, -1], False, [[1], [0.25], [-1]], "<f4"),
        ([1, 2**40, -1], False, [[1], [2**40], [-1]], "<f4"),
        ([[1, 2], 3, [4.5]], False, [[1, 2], [3], [4.5]], "<f4"),
        ([True, False, 0.3], True, [[1], [-1], [1]], "<i4"),
    ],
)
def test_rewards_keep_their_value(
    rewards: list[Any], binary: bool, expected: list[list[float]], dtype: str, chat_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(tmp_path, *({"good": CHAT, "bad": CHAT[:3], "score": reward} for reward in rewards))
    summary = run(tmp_path, path, chat_model(), keys=("good", "bad"), reward_key="score", binary_reward=binary)
    for key in ("good", "bad"):
        assert documents(tmp_path / f"out_{key}_reward_document") == expected
        assert IndexedDataset(tmp_path / f"out_{key}_reward_document").dtype == np.dtype(dtype)
    names = [f"out_{key}{part}_document" for key in ("good", "bad") for part in ("", "_label", "_reward")]
    assert [path.name for path in summary.prefixes] == names
    assert summary.documents == 3


def test_records_that_are_no_conversations(chat_model: Callable[..., Path], tmp_path: Path) -> None:
    model = chat_model()
    bad = [
        ({"text": CHAT}, "no key 'conversation'"),
        ("text", "no key 'conversation'"),
        ({"conversation": "hello"}, 'it has to be a list of turns, each {"role": ..., "content": ...}'),
        ({"conversation": []}, "it has to be a list of turns"),
        ({"conversation": [CHAT[0], {"role": "user"}]}, 'turn 2 has to be {"role": ..., "content": ...} with two strings'),
        ({"conversation": [{"role": "user", "content": "half \ud83d"}]}, "turn 1 has half a character"),
    ]
    for record, message in bad:
        with pytest.raises(DatasetError) as caught:
            run(tmp_path, write(tmp_path, record), model)
        assert f"chats.jsonl:1: {'' if 'no key' in message else 'the value of '}" in str(caught.value)
        assert message in str(caught.value)
    summary = run(tmp_path, write(tmp_path, *(record for record, _ in bad), {"conversation": CHAT}), model, on_error="skip")
    assert summary.documents == 1
    assert summary.left_out[0] == "left out: 6 (value that is no conversation 4, missing key 2)"
    for reward, name in (("good", "str"), (None, "null"), ([1, "x"], "a list"), (float("nan"), "a number")):
        with pytest.raises(DatasetError, match=rf"the value of 'score' is {name}, not a finite number or a list of finite numbers"):
            run(tmp_path, write(tmp_path, {"conversation": CHAT, "score": reward}), model, reward_key="score")


def test_templates_that_do_not_show_who_speaks(chat_model: Callable[..., Path], tmp_path: Path) -> None:
    model, path = chat_model(FORGETFUL), write(tmp_path, {"conversation": CHAT})
    with pytest.raises(
        DatasetError,
        match=r"chats\.jsonl:1: the chat template writes the first 2 turn\(s\) .* Try --only-last or --no-mask, or "
        r"a template",
    ):
        run(tmp_path, path, model)
    assert run(tmp_path, path, model, mask=False).documents == 1
    chat = [{"role": "user", "content": "hello"}, {"role": "tool", "content": "x"}]
    path = write(tmp_path, {"conversation": chat}, {"conversation": CHAT})
    with pytest.raises(DatasetError, match="the chat template refuses it: no tools here"):
        run(tmp_path, path, chat_model(STRICT))
    summary = run(tmp_path, path, chat_model(STRICT), on_error="skip")
    assert (summary.documents, summary.left_out[0]) == (1, "left out: 1 (value that is no conversation 1)")
    assert len(documents(tmp_path / "out_conversation_document")) == 1


def test_tokenizers_that_will_not_do(chat_model: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path, {"conversation": CHAT})
    with pytest.raises(TokenizerError, match=r"--tokenizer-path .*model has no chat template: no chat_template in its tokenizer_config\.json"):
        run(tmp_path, path, chat_model(None))
    with pytest.raises(TokenizerError, match=r"--for-rm labels the end-of-sequence token, and .*model has none"):
        run(tmp_path, path, chat_model(CHATML, None), for_rm=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"--tokenizer-path .*empty is a folder without a tokenizer that transformers can read"):
        run(tmp_path, path, tmp_path / "empty")
    with pytest.raises(TokenizerError, match="--tokenizer-path no/such is neither a folder nor a tokenizer on the hub"):
        run(tmp_path, path, Path("no/such"))
    with pytest.raises(DatasetError, match="--jsonl-keys chat chat_label: 'chat_label' would also be the name of another key's output"):
        run(tmp_path, path, chat_model(), keys=("chat", "chat_label"))


def test_ftfy_and_workers(chat_model: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("ftfy")
    broken = [{"role": "user", "content": "schÃ¶n"}, {"role": "assistant", "content": "fein"}]
    fine = [{"role": "user", "content": "schön"}, {"role": "assistant", "content": "fein"}]
    path = write(tmp_path, {"conversation": broken}, {"conversation": fine})
    run(tmp_path, path, chat_model(), ftfy=True, workers=2)
    first, second = documents(tmp_path / "out_conversation_document")
    assert first == second


CLOSED = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [
        (CHATML, "<|im_end|>", ["<|im_end|>", "\n", "<|endoftext|>"]),  # the template ends the turn, the document has an end of its own
        (PLAIN, "<|im_end|>", ["\n", "<|im_end|>", "<|endoftext|>"]),  # nothing else would teach the end of a turn
        (PLAIN, "<|endoftext|>", ["\n", "<|endoftext|>"]),
        (CLOSED, "<|endoftext|>", ["s", "<|endoftext|>"]),  # the template has ended the document already
    ],
)
@pytest.mark.parametrize("for_rm", [False, True])
def test_turns_and_documents_end_with_tokens_of_their_own(
    template: str, eos: str, end: list[str], for_rm: bool, chat_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = chat_model(template, eos)
    run(tmp_path, write(tmp_path, {"conversation": CHAT}), model, for_rm=for_rm)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    (tokens,), (labels,) = (documents(tmp_path / f"out_conversation{kind}_document") for kind in ("", "_label"))
    assert [
        tokenizer.decode([int(token)], skip_special_tokens=False)[-len(text) :] for token, text in zip(tokens[-len(end) :], end, strict=True)
    ] == end
    assert labels[-1] == tokens[-1]
    assert for_rm == (set(labels[:-1]) == {-100})
