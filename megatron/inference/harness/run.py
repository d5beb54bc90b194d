"""One evaluation with lm-evaluation-harness, from the names of the tasks to the results."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron.config.neox import NeoXConfig
from megatron.config.section import ConfigError
from megatron.data.progress import Reporter
from megatron.data.tokenizer.companions import folder_of, named_token
from megatron.inference.engine import Engine
from megatron.inference.errors import InferenceError
from megatron.inference.harness.forward import Forward
from megatron.inference.harness.likelihood import Batching
from megatron.inference.harness.tasks import harness_output, harness_seeds, without_pools
from megatron.inference.model import AS_CHOSEN, ReadyModel
from megatron.inference.runner import Runner
from megatron.inference.score import BATCH_TOKENS
from megatron.inference.serve.chat import find_template
from megatron.model.moe.routing import looks_at_later_tokens

if TYPE_CHECKING:
    from megatron.inference.harness.language_model import Means

log = logging.getLogger(__name__)
REQUESTS_AT_ONCE = 16
"""Answers that are generated together."""
DRAWS = 10_000
"""Resamplings for the standard errors that have no formula, as in GPT-NeoX."""
BEGINNINGS = {"SPMTokenizer": "<s>", "TiktokenTokenizer": "<|begin_of_text|>"}
"""Tokenizer type -> the token that begins a text, where no file beside the tokenizer names it."""
OF_THE_HARNESS = (__name__, "megatron.inference.harness.tasks")
"""Modules of ours that the harness's own code runs in."""


def check_installed() -> None:
    """Raises ConfigError, with what to do, where the package is missing."""
    try:
        metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        message = "'eval_tasks' needs the package 'lm_eval': pip install -c requirements/constraints.txt 'lm_eval[hf]', or run make setup-run"
        raise ConfigError([message]) from None


def whole_window(ready: ReadyModel) -> ReadyModel:
    """The model with all positions that it has as its context, as the exported model and GPT-NeoX's harness have it, and its weights as saved."""
    sizes = ready.sizes.model_copy(update={"seq_length": ready.sizes.max_positions})
    return dataclasses.replace(ready, sizes=sizes, decoding=AS_CHOSEN._replace(backend=ready.decoding.backend))


def prefix_token(config: NeoXConfig, ready: ReadyModel) -> int:
    """The token before a text that has nothing before it: the one that begins a text, else the one that ends a document. Raises InferenceError."""
    folder, tokenizer = folder_of(config.data), ready.tokenizer
    named = None if folder is None else named_token(folder, "bos_token")
    found = tokenizer.token_to_id(named or BEGINNINGS.get(config.data.tokenizer_type, ""))
    found = tokenizer.eod if found is None else found
    if found is None:
        raise InferenceError("eval_tasks: the tokenizer has no token that begins a text or ends a document, and the harness puts one before a text.")
    return found


class Model(NamedTuple):
    """A model with its whole window, and its two ways to compute."""

    ready: ReadyModel
    runner: Runner
    """Generates."""
    forward: Forward
    """Scores."""


def run_tasks(config: NeoXConfig, tasks: dict[str, Any], model: Model, reporter: Reporter) -> dict[str, Any]:
    """The harness's results for tasks that `load_tasks` gave, with GPT-NeoX's `config` and our checkpoint in it. Every process of the model calls it.

    Raises InferenceError and ConfigError.
    """
    from lm_eval.evaluator import evaluate

    from megatron.inference.harness.language_model import HarnessLM

    evaluation, started = config.evaluation, time.time()
    means = means_of(config, model)
    shown = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    with harness_seeds(), without_pools(), harness_output(shown=shown):
        try:
            found = evaluate(
                HarnessLM(model.forward, means, reporter),
                tasks,
                limit=evaluation.eval_limit,
                bootstrap_iters=DRAWS,
                log_samples=evaluation.eval_log_samples,
                apply_chat_template=means.chat is not None,
                fewshot_as_multiturn=means.chat is not None,
            )
        except (AssertionError, TypeError, KeyError) as error:
            if not is_of_a_task(error):
                raise
            raise InferenceError(
                f"eval_tasks: the code of a task, or of the harness, fails: {type(error).__name__}: {error} ({place_of(error)}). "
                "Leave this task out of eval_tasks."
            ) from error
    assert found is not None
    return {**found, "config": described(config, model.ready), "lm_eval_version": metadata.version("lm_eval"), "date": started}


def is_of_a_task(error: Exception) -> bool:
    """Whether the code of a task or of the harness raised it, and not a bug of this package, whose traceback has to be seen."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not any(name.startswith("megatron.") and name not in OF_THE_HARNESS for name in modules)


def place_of(error: Exception) -> str:
    """The file and line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno}"


def means_of(config: NeoXConfig, model: Model) -> Means:
    """What the harness's interface needs. Raises InferenceError where a chat template is asked for and there is none."""
    from megatron.inference.harness.language_model import NO_TEMPLATE, Means

    ready = model.ready
    chat = find_template(folder_of(config.data)) if config.evaluation.eval_chat_template else None
    if config.evaluation.eval_chat_template and chat is None:
        raise InferenceError(NO_TEMPLATE)
    alone = looks_at_later_tokens(ready.gpt)
    if alone:
        what = "chooses experts by later tokens too, so the model sees parts of the answers that it is asked for"
        log.warning("moe_router_type: %s %s: the scores flatter it.", config.moe.moe_router_type, what)
    batching = Batching(BATCH_TOKENS.get(ready.device.type, BATCH_TOKENS["cpu"]), alone=alone)
    engine = Engine(ready, model.runner, maximum_requests=REQUESTS_AT_ONCE)
    return Means(ready.tokenizer, prefix_token(config, ready), ready.context_length, batching, engine, chat)


def described(config: NeoXConfig, ready: ReadyModel) -> dict[str, Any]:
    """What was measured, and how: GPT-NeoX's entries, and the checkpoint."""
    evaluation = config.evaluation
    return {
        "model": "structmoe-neox",
        "model_args": config.flat(),
        "num_fewshot": evaluation.eval_num_fewshot,
        "batch_size": None,
        "device": str(ready.device),
        "limit": evaluation.eval_limit,
        "bootstrap_iters": DRAWS,
        "checkpoint": str(ready.path),
        "iteration": ready.iteration,
        "max_length": ready.context_length,
        "dtype": str(ready.dtype).removeprefix("torch."),
        "eval_data": evaluation.eval_data,
        "chat_template": evaluation.eval_chat_template,
    }


def write_samples(path: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """One JSON lines file for each task, beside the results file `path`. Raises OSError."""
    from lm_eval.utils import handle_non_serializable

    written = []
    for task, documents in samples.items():
        file = path.with_name(f"{path.stem}_samples_{task.replace('/', '_')}.jsonl")
        with file.open("w", encoding="utf-8") as out:
            for document in documents:
                out.write(json.dumps(document, default=handle_non_serializable, ensure_ascii=False) + "\n")
        written.append(file)
    return written
