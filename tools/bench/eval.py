#!/usr/bin/env python
"""Compare the time of lm-evaluation-harness's tasks through our interface with lm-eval's own backend for the exported model.

python tools/bench/eval.py --checkpoint runs/quickstart --tasks arc_easy piqa --data hub/ --limit 100

Both run in this process, in turns, on the same questions; the medians count. The answers are compared too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare our interface to lm-evaluation-harness with its hf backend: time, and every answer.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or the directory of a run")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of tasks")
    parser.add_argument("--data", help="folder with the data of the tasks; default: the hub")
    parser.add_argument("--limit", type=int, default=100, help="documents of each task; default: 100")
    parser.add_argument("--turns", type=int, default=3, help="how often each is timed; default: 3")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a batch of the hf backend; default: 8")
    return parser.parse_args(argv)


def build(options: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any]:
    """(configuration, our way, theirs): each way is called without arguments and returns the harness's results."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from megatron.config import config_from_dict
    from megatron.convert.opened import open_checkpoint
    from megatron.convert.to_huggingface import Export, export_checkpoint
    from megatron.data.progress import build_reporter
    from megatron.inference.harness.forward import ReadyForward
    from megatron.inference.harness.run import Model, run_tasks, whole_window
    from megatron.inference.harness.tasks import harness_output, harness_seeds, load_tasks, without_pools
    from megatron.inference.model import load_ready_model
    from megatron.inference.runner import build_runner

    quiet = build_reporter(quiet=True)
    export_checkpoint(Export(options.checkpoint, folder, check=False), quiet)
    opened = open_checkpoint(options.checkpoint)
    asked = {"eval_tasks": options.tasks, "eval_limit": options.limit, "eval_data": options.data, "eval_log_samples": True}
    config = config_from_dict({**opened.source.config.given(), **asked, "load": str(options.checkpoint)})
    ready = whole_window(load_ready_model(config))
    model = Model(ready, build_runner(ready), ReadyForward(ready))
    theirs = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=options.batch_size)

    def run_ours() -> Any:
        return run_tasks(config, load_tasks(config.evaluation), model, quiet)

    def run_theirs() -> Any:
        tasks = load_tasks(config.evaluation)
        with harness_seeds(), without_pools(), harness_output(shown=False):
            return evaluate(theirs, tasks, limit=options.limit, bootstrap_iters=10_000, log_samples=True)

    return config, run_ours, run_theirs


def differences(ours: Any, theirs: Any) -> tuple[int, int, float]:
    """(answers, how many of them are other texts or predictions, largest difference of a log-likelihood)."""
    answers, others, largest = 0, 0, 0.0
    for task, documents in ours["samples"].items():
        for own, other in zip(documents, theirs["samples"][task], strict=True):
            for [answer], [expected] in zip(own["resps"], other["resps"], strict=True):
                answers += 1
                pair = answer if isinstance(answer, tuple) else (answer, None)
                known = expected if isinstance(expected, tuple) else (expected, None)
                others += pair[1] != known[1] or (isinstance(answer, str) and answer != expected)
                largest = max(largest, abs(pair[0] - known[0])) if not isinstance(answer, str) else largest
    return answers, others, largest


def main(argv: list[str]) -> int:
    options = parse(argv)

    def work() -> None:
        from megatron.training.process import choose_accelerator

        choose_accelerator()
        with tempfile.TemporaryDirectory() as folder:
            _, ours, theirs = build(options, Path(folder) / "exported")
            seconds: dict[str, list[float]] = {"ours": [], "hf": []}
            results: dict[str, Any] = {}
            for _ in range(options.turns):
                for name, run in (("ours", ours), ("hf", theirs)):
                    started = time.perf_counter()
                    results[name] = run()
                    seconds[name].append(time.perf_counter() - started)
        answers, others, largest = differences(results["ours"], results["hf"])
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            print(f"{name:5} median {medians[name]:.2f} s of {', '.join(f'{value:.2f}' for value in values)}")
        print(f"ours has {medians['hf'] / medians['ours']:.2f} times the speed of lm-eval's hf.")
        print(f"{answers:,} answers, {others} of them differ; largest difference of a log-likelihood: {largest:.1e}.")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
