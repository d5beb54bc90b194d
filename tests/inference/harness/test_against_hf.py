"""Our interface against lm-eval's own backend for the exported model: the same predictions and log-likelihoods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.convert.to_huggingface import Export, export_checkpoint
from megatron.data.progress import build_reporter
from megatron.inference.harness.tasks import harness_seeds, load_tasks, without_pools
from megatron.testing.tiny import tiny_config
from tests.inference.harness.local_data import hub, measure

pytestmark = pytest.mark.timeout(600)
"""The harness and its hf backend import much, which takes minutes on a busy machine."""
MULTIPLE_CHOICE = ["arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "openbookqa", "social_iqa", "boolq", "sciq"]


def measure_exported(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The results of lm-eval's `hf` on the export of a checkpoint."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    export_checkpoint(Export(Path(values["load"]), folder, check=False), build_reporter(quiet=True))
    evaluation = tiny_config(values).evaluation
    model = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=4)
    with harness_seeds(), without_pools():
        found: dict[str, Any] = evaluate(model, load_tasks(evaluation), limit=evaluation.eval_limit, log_samples=True, bootstrap_iters=0)
    return found


TWO_STEPS = 2.4e-7
"""Of float32, as a part of the number."""


def check_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every answer is the same; sums to the rounding of their backend, which adds in float32: at 825 nats its numbers are 6e-5 apart."""
    assert ours["results"].keys() == theirs["results"].keys()
    for task, documents in ours["samples"].items():
        for own, other in zip(documents, theirs["samples"][task], strict=True):
            assert own["arguments"] == other["arguments"]
            for [answer], [expected] in zip(own["resps"], other["resps"], strict=True):
                if isinstance(answer, tuple):
                    assert answer[0] == pytest.approx(expected[0], abs=1e-4, rel=TWO_STEPS), task
                    assert answer[1] == expected[1], task
                else:
                    assert answer == (pytest.approx(expected, rel=1e-6, abs=1e-4) if isinstance(answer, float) else expected), task
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float) and not metric.startswith("alias"):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


@pytest.mark.parametrize(("kind", "tasks"), [("structmoe", ["arc_easy", "boolq-seq2seq", "wikitext"]), ("mixtral", ["arc_easy", "lambada_openai"])])
def test_every_answer_is_that_of_the_exported_model(
    checkpoint_of: Callable[..., dict[str, Any]], small_tokenizer: Path, task_data: Path, tmp_path: Path, kind: str, tasks: list[str]
) -> None:
    values = {**checkpoint_of(kind, small_tokenizer, seq_length=300, max_position_embeddings=300), "eval_data": str(task_data)}
    values |= {"eval_tasks": tasks, "eval_limit": 10, "eval_log_samples": True}
    ours = measure(values)
    check_equal(ours, measure_exported(values, tmp_path / "hf"))
    accuracies = [row["acc"] for row in ours["samples"]["arc_easy"]]
    assert len(accuracies) == 10
    assert 0 < sum(accuracies) < 10, "predictions differ"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["structmoe", "mixtral"])
def test_a_hundred_documents_of_each_task(checkpoint_of: Callable[..., dict[str, Any]], shared_dir: Path, tmp_path: Path, kind: str) -> None:
    """Nine multiple-choice tasks, last words, whole texts and answers, with GPT-NeoX's tokenizer and windows that some texts do not fit into."""
    tokenizer = shared_dir / "data" / "tokenizers" / "20B_tokenizer.json"
    values = checkpoint_of(kind, tokenizer, seq_length=512, max_position_embeddings=512, init_method_std=0.2)
    tasks = [*MULTIPLE_CHOICE, "lambada_openai", "wikitext", "boolq-seq2seq"]
    values |= {"eval_data": str(shared_dir / "data" / "eval"), "eval_tasks": tasks, "eval_limit": 100, "eval_log_samples": True}
    check_equal(measure(values), measure_exported(values, tmp_path / "hf"))


def test_a_tokenizer_that_begins_every_text(checkpoint_of: Callable[..., dict[str, Any]], shared_dir: Path, tmp_path: Path, task_data: Path) -> None:
    """Llama's: `<s>` comes from the tokenizer's own template, and is the prefix token."""
    tokenizer = shared_dir / "data" / "models" / "stories260K" / "hf" / "tokenizer.json"
    hub(
        tmp_path,
        "EleutherAI/lambada_openai",
        "default",
        {"test": [{"text": "Once upon a time there was a little girl"}, {"text": "He said hello to Tom"}]},
    )
    values = checkpoint_of("mixtral", tokenizer, seq_length=300, max_position_embeddings=300)
    values |= {"eval_data": str(tmp_path), "eval_tasks": ["lambada_openai"], "eval_log_samples": True}
    check_equal(measure(values), measure_exported(values, tmp_path / "hf"))
