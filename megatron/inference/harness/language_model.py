"""Our model behind lm-evaluation-harness's interface. This file needs the package lm_eval.

The rules are those of the harness's own backend for Hugging Face models, so that both give the same numbers: the same prefix token, the same windows,
the same cut of a context that is too long.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron.data.progress import Reporter, Stage
from megatron.data.tokenizer import Tokenizer
from megatron.data.tokenizer.huggingface import RustTokenizer
from megatron.inference.engine import Engine
from megatron.inference.errors import InferenceError
from megatron.inference.harness.answers import generate_answers, question
from megatron.inference.harness.forward import Forward
from megatron.inference.harness.likelihood import Batching, Likelihood, Progress, score_parts, sum_parts
from megatron.inference.harness.requests import Scored, cut
from megatron.inference.serve.chat import ChatTemplate
from megatron.inference.serve.errors import ApiError
from megatron.mpu.groups import ALONE

log = logging.getLogger(__name__)
NO_TEMPLATE = "eval_chat_template: there is no chat template beside the tokenizer (chat_template.jinja); leave the key out."


@dataclass(frozen=True)
class Means:
    """What the interface needs of a model."""

    tokenizer: Tokenizer
    prefix: int
    """The token before a text that has nothing before it."""
    window: int
    """Most tokens that the model reads."""
    batching: Batching
    engine: Engine
    """Generates."""
    chat: ChatTemplate | None = None
    """None: the tokenizer has no template."""


class HarnessLM(TemplateLM):
    """All three kinds of request. Every process of the model makes one, and gets all requests."""

    def __init__(self, forward: Forward, means: Means, reporter: Reporter) -> None:
        super().__init__()
        self.forward, self.means, self.reporter = forward, means, reporter

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; without one the prefix token."""
        eod = self.means.tokenizer.eod
        return self.means.prefix if eod is None else eod

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        return self.means.prefix

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads."""
        return self.means.window

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return type(self.means.tokenizer).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
        """Tokens of a text, with those that the tokenizer's own template adds unless `add_special_tokens` is False or the text begins with them."""
        tokenizer = self.means.tokenizer
        if not isinstance(tokenizer, RustTokenizer):
            return tokenizer.encode(string)
        prefix = tokenizer.entry(self.means.prefix)
        bare = add_special_tokens is False or (add_special_tokens is None and prefix is not None and string.startswith(prefix))
        return tokenizer.encode_alone(string) if bare else tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether every token of it is the most likely one. `disable_tqdm`: our own progress takes its place."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **settings: Any) -> list[Likelihood]:
        window = self.max_length
        parts: list[Scored] = []
        for number, ((context, continuation), context_tokens, tokens) in enumerate(requests):
            if not tokens:
                raise InferenceError(
                    f"The tokenizer has no tokens for the answer {continuation!r} after {context[-40:]!r}: the task cannot be scored."
                )
            parts += cut(number, context_tokens, tokens, window)
        short = sum(len(context) + len(tokens) > window + 1 for _, context, tokens in requests)
        if short:
            log.warning("%d of %d questions are longer than the model's %d tokens: they lose their beginning.", short, len(requests), window)
        with self.reporter.stage("log-likelihoods", _bytes(requests)) as stage:
            counted = _progress(stage, _bytes(requests), len(parts))
            answers = score_parts(self.forward, parts, len(requests), batching=self.means.batching, progress=counted)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(answer))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, the first token after the prefix token. Every token counts once, in windows as full as can be."""
        parts: list[Scored] = []
        for number, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            for before, after in map(make_disjoint_window, windows):
                parts += cut(number, before, after, self.max_length)
        size = sum(len(request.args[0].encode()) for request in requests)
        with self.reporter.stage("log-likelihoods of texts", size) as stage:
            batching, counted = self.means.batching, _progress(stage, size, len(parts))
            answers = sum_parts(self.forward, parts, len(requests), batching=batching, progress=counted)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each context, up to the first stop string."""
        engine = self.means.engine
        questions = [question(engine.ready, self.tok_encode(context), settings) for context, settings in (request.args for request in requests)]
        size = sum(len(request.args[0].encode()) for request in requests)
        cut_short = sum(asked.maximum_tokens < asked.wanted for asked in questions)
        if cut_short:
            what = f"{questions[0].wanted} tokens; the model's whole context has {self.max_length}, so an answer gets half of it"
            log.warning("%d of %d tasks ask for answers of up to %s.", cut_short, len(questions), what)
        with self.reporter.stage("answers", size) as stage:
            group = self.forward.replicas if self.forward.independent else ALONE
            answers = generate_answers(engine, questions, group, _progress(stage, size, len(questions)))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text; without its system messages where the template refuses them, as lm-eval's hf does. Raises InferenceError."""
        chat = self.means.chat
        if chat is None:
            raise InferenceError(NO_TEMPLATE)
        try:
            return chat.render(chat_history, add_generation_prompt=add_generation_prompt)
        except ApiError:
            others = [message for message in chat_history if message["role"] != "system"]
        try:
            return chat.render(others, add_generation_prompt=add_generation_prompt)
        except ApiError as error:
            raise InferenceError(f"eval_chat_template: {error}") from None

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template, which the results name by its hash. None: there is none."""
        return None if self.means.chat is None or not chat_template else self.means.chat.text


def _bytes(requests: Sequence[tuple[tuple[str, str], list[int], list[int]]]) -> int:
    return sum(len((context + continuation).encode()) for (context, continuation), _, _ in requests)


def _progress(stage: Stage, size: int, parts: int) -> Progress:
    """Counts the bytes of all requests as the share of the parts that are done."""

    def advance(done: int, tokens: int) -> None:
        before = stage.documents
        now = min(before + done, parts)
        stage.advance(size * now // parts - size * before // parts, now - before, tokens)

    return advance
