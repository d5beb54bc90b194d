"""The work of eval.py: it scores text files, shows the numbers and writes them to a file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron.config import disk
from megatron.config.evaluation import EvaluationConfig
from megatron.config.neox import NeoXConfig
from megatron.config.section import ConfigError
from megatron.data.input.archives import ARCHIVE_SUFFIXES
from megatron.data.input.bad_input import NOTICES, Kind, Problem
from megatron.data.input.input_files import kind_of
from megatron.data.input.opening import begin
from megatron.data.input.reading import read_documents
from megatron.data.input.recognise import compression_taken, container_taken, form_taken
from megatron.data.progress import Reporter
from megatron.data.tokenizer.lost import lost_text
from megatron.inference.decoder.int8 import round_to_int8
from megatron.inference.decoder.parts import NotServed
from megatron.inference.engine import Engine
from megatron.inference.errors import InferenceError
from megatron.inference.harness.forward import ReadyForward
from megatron.inference.harness.run import Model, check_installed, run_tasks, whole_window, write_samples
from megatron.inference.harness.shown import log_results, tasks_scalars, tasks_table
from megatron.inference.harness.tasks import load_tasks
from megatron.inference.long_context.by_position import RangeLoss, losses_by_position, positions_table
from megatron.inference.long_context.passkey import Asked, find_passkeys, passkey_table, remarks
from megatron.inference.long_context.picture import draw_context
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.prompts import read_text
from megatron.inference.runner import build_runner
from megatron.inference.score import TextScore, score_text
from megatron.monitor.sinks import check_sinks
from megatron.mpu.groups import current_groups

log = logging.getLogger(__name__)


def evaluate(config: NeoXConfig, console: Console, reporter: Reporter) -> Path | None:
    """Measures the configured checkpoint on everything that was asked for (`eval_text_files`, `eval_passkey_lengths`, `eval_tasks`) and returns the
    path of the results file. The processes that take part call it together; the first one shows and writes the results, and the others return None.

    Raises ConfigError, InferenceError for a file or task that cannot be used (before the model is loaded), and what load_ready_model raises.
    """
    evaluation = config.evaluation
    check_asked(config)
    stride = resolve_stride(evaluation, config.model.seq_length)
    texts = read_texts(evaluation) if evaluation.eval_text_files else {}
    tasks = None
    if evaluation.eval_tasks:
        check_installed()
        check_sinks(config.logging)
        tasks = load_tasks(evaluation, shown=current_rank() == 0)
    ready = load_ready_model(config)
    log.info("%s.", ready.description)
    content: dict[str, Any] = {"results": {}, "config": {}}
    alone = current_groups().data.rank == 0  # where several processes have the whole model, they share the tasks only
    if texts and alone:
        content |= measure_texts(config, ready, texts, console, reporter)
    if evaluation.eval_passkey_lengths and alone:
        content["passkey"] = measure_passkey(config, ready, console, reporter)
    if tasks is not None:
        found = measure_tasks(config, ready, tasks, reporter)
        content = {**content, **found, "results": {**found["results"], **content["results"]}, "config": {**content["config"], **found["config"]}}
    if texts and alone and ready.decoding.weights == "int8":
        measure_rounded(ready, texts, entries=content["results"], stride=stride, console=console, reporter=reporter)
    if current_rank() > 0:
        return None
    path = write_all(config, ready, content, console)
    if ready.offloaded is not None:
        ready.offloaded.finish(console)
    return path


def current_rank() -> int:
    """This process's rank among those that evaluate."""
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0


def check_asked(config: NeoXConfig) -> None:
    """Raises ConfigError where nothing, or something that cannot be, is asked for."""
    evaluation = config.evaluation
    if not (evaluation.eval_text_files or evaluation.eval_tasks or evaluation.eval_passkey_lengths):
        what = "the text files to measure, such as -o 'eval_text_files=[data/sotu/test.txt]'; or eval_tasks: the tasks, such as --eval_tasks piqa"
        raise ConfigError([f"'eval_text_files' must be given: {what}; or eval_passkey_lengths"])
    if evaluation.eval_position_ranges and not evaluation.eval_text_files:
        raise ConfigError(["'eval_position_ranges' needs eval_text_files: the texts to measure"])
    if config.inference.expert_offload is not None and config.inference.expert_offload.record is not None:
        raise ConfigError(["'expert_offload.record': eval.py does not serve requests, so there is nothing to record; remove it"])


def measure_texts(config: NeoXConfig, ready: ReadyModel, texts: Mapping[str, str], console: Console, reporter: Reporter) -> dict[str, Any]:
    """Scores the texts, shows them, and gives their part of the results."""
    stride, ranges = resolve_stride(config.evaluation, config.model.seq_length), config.evaluation.eval_position_ranges
    log.info("Windows of %d tokens that move by %d.", ready.context_length, stride)
    scores = {name: _score(ready, name, text, stride=stride, reporter=reporter) for name, text in texts.items()}
    positions = {name: _positions(ready, name, text, ranges=ranges, reporter=reporter) for name, text in texts.items()} if ranges else {}
    if current_rank() == 0:
        console.print(results_table(scores))
        _explain(ready, scores)
        for name, found in positions.items():
            console.print(f"{name}: loss by context length", markup=False, highlight=False)
            console.print(positions_table(found))
    content = results(ready, scores, stride)
    return content | ({"context": {name: [row.as_json() for row in found] for name, found in positions.items()}} if ranges else {})


def _explain(ready: ReadyModel, scores: Mapping[str, TextScore]) -> None:
    first = "a uniform guess" if ready.tokenizer.eod is None else "predicted from the end-of-document token"
    log.info(
        "Loss is in nats per token. Bits per byte is -log2 p of all tokens, divided by the bytes of the UTF-8 text; the first token is %s.", first
    )
    for name in (name for name, score in scores.items() if not score.exact):
        if scores[name].lost:
            what = f"has no tokens for {lost_text(scores[name].lost)} of this text"
        else:
            what = "changes this text (decoding its tokens does not give the same text)"
        log.warning("%s: the tokenizer %s, so its bits per byte do not count the whole text.", name, what)


def measure_rounded(
    ready: ReadyModel, texts: Mapping[str, str], *, entries: dict[str, Any], stride: int, console: Console, reporter: Reporter
) -> None:
    """Adds `perplexity_int8` to the entries of the texts. The model stays rounded. Raises InferenceError where the decoder cannot run it."""
    scores = _rounded_scores(ready, texts, stride=stride, reporter=reporter)
    console.print(results_table({f"{name}, int8 weights": score for name, score in scores.items()}))
    for name, score in scores.items():
        change = 100 * (score.perplexity / entries[name]["perplexity"] - 1)
        entries[name]["perplexity_int8"] = score.perplexity
        log.info("%s: int8 weights change the perplexity by %+.3f %%.", name, change)


def measure_passkey(config: NeoXConfig, ready: ReadyModel, console: Console, reporter: Reporter) -> dict[str, Any]:
    """How often the model finds a number in a long text."""
    evaluation = config.evaluation
    whole = whole_window(ready)
    asked = Asked(tuple(evaluation.eval_passkey_lengths or ()), evaluation.eval_passkey_depths, evaluation.eval_passkey_trials, config.training.seed)
    found = find_passkeys(Engine(whole, build_runner(whole), maximum_requests=8), asked, reporter)
    if current_rank() == 0:
        console.print(f"passkey retrieval: share of right answers, {asked.trials} text(s) for each length and depth")
        console.print(passkey_table(found))
        for sentence in remarks(found):
            log.warning("%s", sentence)
    return found.as_json()


def measure_tasks(config: NeoXConfig, ready: ReadyModel, tasks: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """The harness's results."""
    whole, groups = whole_window(ready), current_groups()
    forward = ReadyForward(whole, groups.data)
    return run_tasks(config, tasks, Model(whole, build_runner(whole), forward), reporter)


def write_all(config: NeoXConfig, ready: ReadyModel, content: dict[str, Any], console: Console) -> Path:
    """Writes the results, the samples, the pictures and the trackers' numbers, and returns the path of the results. Raises InferenceError."""
    evaluation = config.evaluation
    samples = content.pop("samples", None)
    if "n-samples" in content:
        console.print(tasks_table(content))
    path = write_results(results_path(evaluation.eval_results_prefix), content)
    written = [] if not samples else write_samples(path, samples)
    if "context" in content or "passkey" in content:
        written += draw_context(path, content)
    log.info("Results written to %s.", " and ".join(map(str, [path, *written])))
    if "n-samples" in content:
        log_results(config, ready.iteration or 0, tasks_scalars(content["results"]))
    return path


def resolve_stride(evaluation: EvaluationConfig, seq_length: int) -> int:
    """`eval_stride`, or half a window if it is not given. Raises ConfigError if it would skip tokens."""
    stride = evaluation.eval_stride or max(1, seq_length // 2)
    if stride > seq_length:
        raise ConfigError([f"'eval_stride' = {stride}: must be at most seq_length ({seq_length}); a larger step would skip tokens"])
    return stride


def read_texts(evaluation: EvaluationConfig) -> dict[str, str]:
    """The text of each file, by the name that the user gave."""
    texts = {name: read_one(Path(name), evaluation) for name in evaluation.eval_text_files or ()}
    empty = [name for name, text in texts.items() if not text]
    if empty:
        raise InferenceError(f"eval_text_files: {', '.join(empty)} is empty: there is nothing to predict.")
    return texts


def read_one(path: Path, evaluation: EvaluationConfig) -> str:
    """The text of one file. A plain text is used as it is, every byte. From JSON, parquet, compressed files and archives the texts are taken, with
    an empty
    line between two, as prepare_data.py writes held-out text. The log says so.

    Raises InferenceError.
    """
    if evaluation.eval_text_format == "text" or not path.is_file() or is_plain_text(path, force_json=evaluation.eval_text_format == "json"):
        return read_text(path, "eval_text_files")

    def report(problem: Problem) -> None:
        if problem.kind in NOTICES:
            log.info("eval_text_files: %s %s.", path, problem.what.replace("--input-format", "eval_text_format:"))
        elif problem.kind is not Kind.BLANK:
            what = str(problem).replace("--jsonl-key)", "eval_jsonl_key)").replace("--input-format", "eval_text_format:")
            raise InferenceError(f"eval_text_files: {what}. To measure the file as it is, with its braces, set eval_text_format: text.")

    texts = [document.text for document in read_documents(path, evaluation.eval_jsonl_key, report, form=evaluation.eval_text_format)]
    log.info("eval_text_files: %s holds %s texts under '%s', measured with an empty line between two.", path, len(texts), evaluation.eval_jsonl_key)
    return "\n\n".join(texts)


def is_plain_text(path: Path, *, force_json: bool) -> bool:
    """Whether the file is the text itself: every byte of the file is a byte of the text."""
    with path.open("rb") as file:
        start = begin(file, seekable=False)
        kind, compression = kind_of(path.name)
        packed = compression_taken(start, compression).kind or container_taken(start, kind).kind in (*ARCHIVE_SUFFIXES, ".parquet")
        return not packed and not force_json and form_taken(start, kind, None, "auto")[0] is None


def results(ready: ReadyModel, scores: Mapping[str, TextScore], stride: int) -> dict[str, Any]:
    """The part of the results file about texts."""
    entries = {
        name: {
            "tokens": score.tokens,
            "bytes": score.bytes,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "exact": score.exact,
            **({"lost_characters": sum(len(piece) * times for piece, times in score.lost.items())} if score.lost else {}),
        }
        for name, score in scores.items()
    }
    settings = {"checkpoint": str(ready.path), "iteration": ready.iteration, "seq_length": ready.context_length, "eval_stride": stride}
    return {"results": entries, "config": {**settings, "dtype": str(ready.dtype).removeprefix("torch.")}}


def results_table(scores: Mapping[str, TextScore]) -> Table:
    """A table with one row for each file."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("text file", overflow="fold")
    for title in ("tokens", "bytes", "loss", "perplexity", "bits per byte"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, score in scores.items():
        table.add_row(name, f"{score.tokens:,}", f"{score.bytes:,}", f"{score.loss:.4f}", f"{score.perplexity:,.2f}", f"{score.bits_per_byte:.4f}")
    return table


def results_path(prefix: str) -> Path:
    """NeoX's name: [<prefix>_]eval_results_<month-day-year-hour-minute-second>.json."""
    name = f"eval_results_{time.strftime('%m-%d-%Y-%H-%M-%S')}.json"
    return Path(f"{prefix}_{name}" if prefix else name)


def write_results(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes the complete file or nothing. Raises InferenceError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(content, indent=1, default=str)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        why = disk.explained(error, path)
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InferenceError(f"eval_results_prefix: {path} cannot be written: {why}.") from error
    return path


def _rounded_scores(ready: ReadyModel, texts: Mapping[str, str], *, stride: int, reporter: Reporter) -> dict[str, TextScore]:
    """The scores after the model's weights were rounded to int8. The model stays rounded. Raises InferenceError where the decoder cannot run it."""
    try:
        round_to_int8(ready.gpt, ready.sizes, ready.tokenizer.vocab_size)
    except NotServed as error:
        raise InferenceError(f"inference_weights: int8 cannot be measured: the compiled decoder cannot serve {error}.") from error
    return {name: _score(ready, f"{name} with int8 weights", text, stride=stride, reporter=reporter) for name, text in texts.items()}


def _score(ready: ReadyModel, name: str, text: str, *, stride: int, reporter: Reporter) -> TextScore:
    size = len(text.encode())
    with reporter.stage(f"scoring {name}", size) as stage:

        def advance(tokens: int, total: int) -> None:
            stage.advance(round(size * tokens / total), documents=0, tokens=tokens)

        return score_text(ready, text, stride=stride, progress=advance)


def _positions(ready: ReadyModel, name: str, text: str, *, ranges: int, reporter: Reporter) -> list[RangeLoss]:
    size = len(text.encode())
    with reporter.stage(f"loss by context length, {name}", size) as stage:
        return losses_by_position(
            ready, name, text, ranges=ranges, progress=lambda tokens, total: stage.advance(round(size * tokens / total), 0, tokens)
        )
