"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.monitor.sink import Value, scalars


class TensorboardSink:
    """Needs the package `tensorboard`. Events after `resume_from` are hidden: those steps come again."""

    def __init__(self, directory: str, *, resume_from: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory, purge_step=resume_from + 1 if resume_from else None)

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        for key, value in scalars(values).items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        self._writer.close()
