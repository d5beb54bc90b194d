"""Which token of a vocabulary ends a document, and which tokens end an answer. In a chat model these differ: a turn ends with <|im_end|>, a document
with <|endoftext|>."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron.data.tokenizer.companions import chat_templates, named_token, stated_ends

# Ends of text by name. The first two end a document whatever a chat template makes of `eos_token`, so they go before it; the rest comes after it.
BEFORE_CONFIG = ("<|endoftext|>", "<|end_of_text|>")
AFTER_CONFIG = ("</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS_TOKEN>", "<｜end▁of▁sentence｜>")
TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|end_of_turn|>", "<|endofturn|>"),
    *("<|END_OF_TURN_TOKEN|>", "<|return|>", "<|call|>", "[EOT]", "<|user|>", "<|observation|>", "<|eoa|>", "<|end_of_role|>", "<|role_end|>"),
)
"""Names that chat models give to the end of a turn. If `eos_token` is one of them, it ends a document only if the vocabulary has no other end."""


def find_end_of_document(token_to_id: Callable[[str], int | None], folder: Path) -> int | None:
    """The id of the token that ends a document. None: the vocabulary has none of those below.

    The first one that exists is taken: <|endoftext|> (NeoX's only rule); <|end_of_text|> (Llama 3); the `eos_token` in the settings of `folder`, if
    it
    does not end the turns of a chat; another usual name; the `eos_token` even if it ends turns.
    """
    return choose_end(token_to_id, named_token(folder, "eos_token"), chat_templates(folder))


def choose_end(token_to_id: Callable[[str], int | None], eos_token: str | None, template: str) -> int | None:
    """See `find_end_of_document`. `eos_token` None: the settings name none. `template`: the chat templates; empty: there are none."""
    configured = [] if eos_token is None else [eos_token]
    turn = configured if eos_token is not None and ends_turns(eos_token, template) else []
    names = (*BEFORE_CONFIG, *(name for name in configured if name not in turn), *AFTER_CONFIG, *turn)
    ids = (token_to_id(name) for name in names)
    return next((number for number in ids if number is not None), None)


def ends_turns(token: str, template: str) -> bool:
    """Whether a token ends the turns of a chat, by its name or because the chat template writes it, and is not a usual end of a text."""
    return token in TURN_ENDS or (token in template and token not in (*BEFORE_CONFIG, *AFTER_CONFIG))


def find_stop_tokens(token_to_id: Callable[[str], int | None], folder: Path | None, eod: int | None) -> tuple[int, ...]:
    """The ids that end an answer: the end of a document, the `eos_token` of the settings in `folder`, and every end that the model's
    generation_config.json and config.json name. `folder` None: there are no settings."""
    ids = [] if eod is None else [eod]
    if folder is not None:
        eos_token = named_token(folder, "eos_token")
        configured = None if eos_token is None else token_to_id(eos_token)
        ids += [*([] if configured is None else [configured]), *stated_ends(folder)]
    return tuple(dict.fromkeys(ids))
