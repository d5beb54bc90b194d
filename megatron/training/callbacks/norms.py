"""Norms of single parameters, of their gradients and of the optimizer's averages. They help to find the cause of a bad run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatron.config.logging import LoggingConfig
from megatron.monitor.sink import Sink
from megatron.mpu.gradients import marks_of, over_processes
from megatron.mpu.groups import current_groups
from megatron.training.callbacks.base import Callback
from megatron.training.gradients import optimizer_state_norms, over_stages, whole_gradients, whole_parameters

if TYPE_CHECKING:
    from megatron.training.step import StepMetrics
    from megatron.training.trainer import Trainer


class Measures(NamedTuple):
    """What to measure: of the gradients (name of the sinks' group -> a function of a weight and its gradient), and after the update."""

    of_gradients: dict[str, Callable[[Tensor, Tensor], Tensor]]
    after_update: dict[str, Callable[[Any], dict[str, Tensor]]]


def measures(config: LoggingConfig) -> Measures | None:
    """The measurements that the configuration asks for. None: it asks for none."""
    gradients = {"gradient_norms": (config.log_grad_norm, _norm), "pct_grad_zeros": (config.log_grad_pct_zeros, _per_cent_zeros)}
    after = {
        "parameter_norms": (config.log_param_norm, _parameter_norms),
        "optimizer_state_norms": (config.log_optimizer_states, optimizer_state_norms),
    }
    chosen = Measures({name: f for name, (on, f) in gradients.items() if on}, {name: f for name, (on, f) in after.items() if on})
    return chosen if any(chosen) else None


class NormsCallback(Callback):
    """Writes the norms at every step, as GPT-NeoX does. Under ZeRO each gradient is gathered on every process, one at a time. A weight that several
    pipeline stages have is measured on the first of them."""

    def __init__(self, chosen: Measures, sinks: Sequence[Sink]) -> None:
        self.chosen = chosen
        self.sinks = sinks
        self._found: dict[str, Tensor] = {}

    def before_update(self, trainer: Trainer) -> None:
        if self.chosen.of_gradients:
            for name, gradient in whole_gradients(trainer.engine):
                weight = trainer.engine.module.get_parameter(name)
                if not marks_of(weight).ds_pipe_replicated:
                    self._found |= {f"{group}/{name}": measure(weight, gradient) for group, measure in self.chosen.of_gradients.items()}

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        for group, measure in self.chosen.after_update.items():
            self._found |= {f"{group}/{name}": number for name, number in measure(trainer.engine).items()}
        if self._found:
            numbers = torch.stack(list(self._found.values())).tolist()
            values = over_stages(dict(zip(self._found, numbers, strict=True)))
            for sink in self.sinks:
                sink.write(trainer.state.iteration, values)
        self._found = {}


def _norm(weight: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole weight, of which this process may have a part."""
    return over_processes(weight, tensor.float().square().sum(), current_groups()).sqrt()


def _per_cent_zeros(weight: Tensor, tensor: Tensor) -> Tensor:
    zeros, every = over_processes(weight, torch.stack([(tensor == 0).float().sum(), tensor.new_tensor(tensor.numel()).float()]), current_groups())
    return 100 * zeros / every


def _parameter_norms(engine: Any) -> dict[str, Tensor]:
    values = ((name, engine.module.get_parameter(name), value) for name, value in whole_parameters(engine))
    return {name: _norm(weight, value) for name, weight, value in values if not marks_of(weight).ds_pipe_replicated}
