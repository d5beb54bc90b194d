"""TensorBoard event files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from megatron.monitor.alerts.alert import Alert
from megatron.monitor.curves import Curves
from megatron.monitor.sink import Value


class TensorboardSink:
    """Needs the package `tensorboard`. Events after `resume_from` are hidden: those steps come again."""

    def __init__(self, directory: str, curves: Curves, *, resume_from: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _without_disk_failures(threading.excepthook)
        self._curves = curves
        self._writer = SummaryWriter(directory, purge_step=resume_from + 1 if resume_from else None)

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        for key, value in self._curves(values).items():
            self._writer.add_scalar(key, value, iteration)

    def alert(self, alert: Alert) -> None:
        """A text under the tag `alerts/KIND`."""
        self._writer.add_text(f"alerts/{alert.kind}", alert.sentence, alert.step)

    def close(self) -> None:
        self._writer.close()


def _without_disk_failures(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable[[threading.ExceptHookArgs], object]:
    """`hook`, but silent about what the system refused to TensorBoard's thread: the next `write` raises it in this one."""

    def report(failure: threading.ExceptHookArgs) -> None:
        if not (type(failure.thread).__name__ == "_AsyncWriterThread" and isinstance(failure.exc_value, OSError)):
            hook(failure)

    return report
