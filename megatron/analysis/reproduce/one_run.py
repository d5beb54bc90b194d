"""One run in a process of its own: training as `train.py` does it, measuring, and the record."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.analysis.reproduce import measure
from megatron.analysis.reproduce.runs import CONFIG, LOG, MAIN, RECORD, Run, write_record
from megatron.config.loader import load_config
from megatron.monitor.jsonl import read_jsonl
from megatron.monitor.sink import Sink
from megatron.training.callbacks.base import Callback
from megatron.training.run import train
from megatron.training.step import StepMetrics
from megatron.training.trainer import Trainer

PARENT_GONE = "the program that started this run has ended"


class FollowParent(Callback):
    """Stops the run, with a checkpoint, when the program that started it has ended without a word."""

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        parent = parent_process()
        if parent is not None and not parent.is_alive() and trainer.stop_requested is None:
            trainer.stop_requested = PARENT_GONE


def in_a_process(run: Run, folder: Path) -> None:
    """The target of a new process. What it prints goes to the run's log. It has succeeded if there is a record."""
    os.setpgid(0, 0)  # Ctrl-C reaches the program that started this one, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        torch.set_num_threads(1)
        try:
            make_record(run, folder)
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted.\n")
        except Exception as error:
            if type(error).__module__.split(".")[0] != "megatron":  # ours explain themselves
                traceback.print_exc()
            sys.stderr.write(f"{error}\n" if str(error) else f"{type(error).__name__}\n")
        sys.stderr.flush()


def make_record(run: Run, folder: Path) -> None:
    """Trains from the beginning or from the run's checkpoint, measures and writes the record. Without a record it was asked to stop.

    Raises what `train` raises.
    """
    begun, used = time.time(), time.process_time()
    file = folder / CONFIG
    file.write_text(yaml.safe_dump({**run.settings, "save": str(folder / "save")}, sort_keys=False), encoding="utf-8")
    held_out, steps, length = run.measure, run.steps, run.settings["seq_length"]

    def callbacks(trainer: Trainer, sinks: Sequence[Sink]) -> list[Callback]:
        text_NS = measure.windows(held_out["validation"], length=length, tokens=held_out["curve_tokens"])
        curve = [measure.CurveCallback(sinks, text_NS, steps=steps, points=held_out["curve_points"])] if run.purpose == MAIN else []
        return [*curve, FollowParent()]

    trainer = train(load_config([file]), callbacks)
    if trainer.exit_status or not trainer.finished:
        return
    trained = time.time()
    record = {"fingerprint": run.fingerprint, "arm": run.arm, "domain": run.domain, "purpose": run.purpose, "seed": run.seed, "rate": run.rate}
    record |= {"steps": steps, "tokens": steps * trainer.plan.tokens_per_step, **measured(run, trainer, folder)}
    record |= {"seconds": round(trained - begun, 1), "seconds_measuring": round(time.time() - trained, 1)}
    record |= {"cpu_seconds": round(time.process_time() - used, 1), "versions": versions()}
    write_record(folder / RECORD, record)
    shutil.rmtree(folder / "save", ignore_errors=True)  # the weights; config.yml makes them again


def measured(run: Run, trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The numbers of a finished run."""
    length = run.settings["seq_length"]

    def loss(text: str) -> float:
        found = measure.windows(run.measure[text], length=length, tokens=run.measure[f"{text}_tokens"])
        return measure.loss_on(trainer.engine, found)

    if run.purpose != MAIN:
        return {"validation_loss": loss("validation")}
    records = list(read_jsonl(folder / "save" / "metrics.jsonl"))
    curve = {one["iteration"]: round(one[measure.CURVE], 5) for one in records if measure.CURVE in one}
    found: dict[str, Any] = {"test_loss": loss("test"), "curve": [[step, curve[step]] for step in sorted(curve)]}
    if trainer.config.moe.has_experts:
        found["routing"] = measure.routing_of(run, folder / "save")
    return found


def versions() -> dict[str, str]:
    """What the numbers may depend on."""
    import deepspeed

    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed.__version__, "machine": platform.machine()}
