"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.monitor.sink import SinkUnavailable, Value, scalars


class TensorboardSink:
    """Raises SinkUnavailable when the `tensorboard` package is not installed. Events after `resume_from` are hidden: those steps come again."""

    def __init__(self, directory: str, *, resume_from: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SinkUnavailable(
                f"tensorboard_dir: {directory} needs the package 'tensorboard' (pip install tensorboard), or leave the key out"
            ) from error
        self._writer = SummaryWriter(directory, purge_step=resume_from + 1 if resume_from else None)

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        for key, value in scalars(values).items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        self._writer.close()
