"""Profiles the time and the memory of a few steps."""

from __future__ import annotations

import errno
import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from megatron.config.logging import LoggingConfig
from megatron.monitor.guarded import wrote
from megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)


class ProfileCallback(Callback):
    """Records the steps after profile_step_start up to profile_step_stop, or up to the end of the run if that comes first.

    `profile`: a trace of PyTorch's profiler for TensorBoard, Perfetto or chrome://tracing; on CUDA it also marks the steps for
    `nsys profile -c cudaProfilerApi`. `memory_profiling`: on CUDA the allocator's history for https://pytorch.org/memory_viz, elsewhere a table of
    the memory that each operator allocated. Every process writes its own files, named by host and rank.
    """

    def __init__(self, config: LoggingConfig, *, rank: int) -> None:
        self.config = config
        self.name = f"{socket.gethostname()}_rank_{rank:02d}_steps_{config.profile_step_start + 1}_to_{config.profile_step_stop}"
        self._on_gpu = torch.cuda.is_available()
        self._running = False
        self._profile: profile | None = None

    def before_training(self, trainer: Trainer) -> None:
        for directory in (self.config.trace_dir, self.config.memory_profiling_path):  # now, not after the steps, if they cannot be made
            Path(directory or ".").mkdir(parents=True, exist_ok=True)
        self._look(trainer)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._look(trainer)

    def after_training(self, trainer: Trainer) -> None:
        self._stop(trainer)

    def close(self) -> None:
        """Ends the profiler after a failure. Nothing is written."""
        if self._running and self._profile is not None:
            with suppress(RuntimeError):
                self._profile.stop()

    def _look(self, trainer: Trainer) -> None:
        if trainer.state.iteration == self.config.profile_step_stop:
            self._stop(trainer)
        elif trainer.state.iteration == self.config.profile_step_start:
            self._start()

    def _start(self) -> None:
        self._running = True
        if self.config.memory_profiling and self._on_gpu:
            torch.cuda.memory._record_memory_history()
        if self.config.profile or not self._on_gpu:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True, with_flops=True)
            self._profile.start()
        if self.config.profile and self._on_gpu:
            torch.cuda.cudart().cudaProfilerStart()

    def _stop(self, trainer: Trainer) -> None:
        if not self._running:
            return
        self._running = False
        if self.config.profile and self._on_gpu:
            torch.cuda.cudart().cudaProfilerStop()
        if self._profile is not None:
            self._profile.stop()
        if self.config.profile and self._profile is not None:
            wrote(self._write_trace, self._file(self.config.trace_dir, ".pt.trace.json"), trainer.failures)
        if self.config.memory_profiling:
            wrote(self._write_memory, Path(self.config.memory_profiling_path or self.config.trace_dir or "."), trainer.failures)

    def _write_trace(self) -> None:
        """Raises OSError; PyTorch's writer says nothing when the disk is full, and leaves no file or one that is cut short."""
        assert self._profile is not None
        file = self._file(self.config.trace_dir, ".pt.trace.json")
        self._profile.export_chrome_trace(str(file))
        if not _is_whole(file):
            raise OSError(errno.ENOSPC, "the trace could not be written completely", str(file))
        log.info("Trace of the profiled steps: %s", file)

    def _write_memory(self) -> None:
        directory = self.config.memory_profiling_path or self.config.trace_dir
        if self._profile is not None and not self._on_gpu:
            file = self._file(directory, ".memory.txt")
            file.write_text(self._profile.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=-1))
        else:
            file = self._file(directory, ".memory.pickle")
            torch.cuda.memory._dump_snapshot(str(file))
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info("Memory of the profiled steps: %s", file)

    def _file(self, directory: str | None, ending: str) -> Path:
        return Path(directory or ".") / f"{self.name}{ending}"


def _is_whole(trace: Path) -> bool:
    if not trace.is_file():
        return False
    with trace.open("rb") as file:
        file.seek(max(0, trace.stat().st_size - 16))
        return file.read().rstrip().endswith(b"}")
