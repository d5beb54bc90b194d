"""DeepSpeed's pipeline engine around a stage of the model (`megatron.model.pipeline`).

DeepSpeed 0.19.8 gives the grid of processes, the schedule (one forward, one backward), the reductions over data parallelism, and ZeRO 1.
What its engine does between two instructions of the schedule is ours, because:
- it runs one whole backward pass for every tensor that a stage sends on (hidden states, losses, usage), and in 16 bits it
  rounds each of them. Here there is one.
- it sends shapes once, so that a micro-batch of another shape hangs, and one message for each tensor.
- it knows no documents, no loss over all labels of a step, and no loads of earlier micro-batches, which every stage needs.
- without ZeRO it would train 16-bit weights with BF16_Optimizer, which has no fp16 and skips no step; here `MasterWeights` does.
- nothing can be measured between the last gradient and the update, which is one instruction there.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any, Protocol

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.model.gpt import GPTOutput
from megatron.model.pipeline import Stage, carriers
from megatron.model.state import LayerState
from megatron.mpu.deepspeed import DeepSpeedMpu
from megatron.mpu.groups import current_groups
from megatron.training.loss import poison_if_not_finite
from megatron.training.master_weights import MasterWeights
from megatron.training.phases import Phases


class MicroBatches(Protocol):
    """The micro-batches of one step."""

    def next_inputs(self) -> dict[str, Any]:
        """The arguments of the model for the next micro-batch."""

    def add(self, output: GPTOutput | LayerState) -> None:
        """Takes what this process's part of the model gave for it."""


class StageModule(PipelineModule):
    """A stage as the module that DeepSpeed's pipeline engine wants. What it has no name for is the stage's."""

    def __init__(self, stage: Stage) -> None:
        groups = current_groups()
        topology = PipeModelDataParallelTopology(num_pp=groups.pipe.size, num_mp=groups.tensor.size, num_dp=groups.data.size)
        self.__dict__["stage"] = stage  # not a part of this module: the names of the weights are those of `sequential`
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
            super().__init__(layers=[_by_stage] * (stage.spans[-1].stop), topology=topology)
        self.sequential = stage.sequential

    def mpu(self) -> DeepSpeedMpu:
        """Our groups."""
        return DeepSpeedMpu(current_groups())

    def _partition_layers(self, method: str = "uniform") -> None:
        spans = self.stage.spans
        self.parts = [0, *(span.stop for span in spans)]
        self._set_bounds(spans[self.stage_id].start, spans[self.stage_id].stop)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stage"], name)

    def train(self, mode: bool = True) -> StageModule:
        """Also of the stage."""
        self.__dict__["stage"].train(mode)
        super().train(mode)
        return self

    def forward(self, tokens_BS: Tensor, **inputs: Any) -> GPTOutput | LayerState:
        """`Stage.run` if there is a `received`, else `Stage.forward`."""
        stage: Stage = self.stage
        output: GPTOutput | LayerState = (stage.run if "received" in inputs else stage)(tokens_BS, **inputs)
        return output


def _by_stage(state: Any) -> Any:
    """In the place of a layer: the stage runs its layers itself."""
    raise NotImplementedError


class StageEngine(PipelineEngine):
    """`take_micro_batches` for a step, and `engine(tokens, ...)` for evaluation, which runs the whole pipeline."""

    _feed: MicroBatches
    _phases: Phases
    _before_update: Callable[[], None]

    def take_micro_batches(self, feed: MicroBatches, *, phases: Phases, before_update: Callable[[], None]) -> None:
        """All micro-batches of a step and the update of the weights. Every process of the grid calls it.

        `before_update` is called when the gradients are complete and the weights have not changed yet.
        """
        self._feed, self._phases, self._before_update = feed, phases, before_update
        self._exec_schedule(self._train_schedule())

    def forward(self, tokens_BS: Tensor, **inputs: Any) -> GPTOutput:
        """`Stage.forward`."""
        output: GPTOutput = DeepSpeedEngine.forward(self, tokens_BS, **inputs)
        return output

    def _exec_nothing(self, buffer_id: int) -> None:
        """The forward pass takes its micro-batch, and receives the state of the stage before, itself."""

    def _exec_forward_pass(self, buffer_id: int) -> None:
        with self._phases("forward"):
            inputs = self._feed.next_inputs()
            received = None if self.is_first_stage() else self.module.receive(tuple(inputs["tokens_BS"].shape))
            output = DeepSpeedEngine.forward(self, received=received, **inputs)
            self.pipe_buffers["inputs"][buffer_id], self.pipe_buffers["outputs"][buffer_id] = received, output
            self._feed.add(output)

    def _exec_send_activations(self, buffer_id: int) -> None:
        with self._phases("forward"):
            self.module.send(self.pipe_buffers["outputs"][buffer_id])

    def _exec_recv_grads(self, buffer_id: int) -> None:
        with self._phases("backward"):
            self.pipe_buffers["output_tensors"][buffer_id] = self.module.receive_gradients(self.pipe_buffers["outputs"][buffer_id])

    def _exec_backward_pass(self, buffer_id: int) -> None:
        with self._phases("backward"):
            output = self.pipe_buffers["outputs"][buffer_id]
            if self.is_last_stage():
                loss, scale = poison_if_not_finite(output.loss), getattr(self.optimizer, "scale_loss", None)
                DeepSpeedEngine.backward(self, loss if scale is None else scale(loss))
            else:
                self._backward_from(carriers(output), self.pipe_buffers["output_tensors"][buffer_id])
            self.pipe_buffers["outputs"][buffer_id] = self.pipe_buffers["output_tensors"][buffer_id] = None

    def _backward_from(self, values: list[Tensor], gradients: list[Tensor]) -> None:
        """One backward pass for all that was sent on, framed as DeepSpeedEngine.backward frames one of a loss."""
        pairs = [(value, gradient) for value, gradient in zip(values, gradients, strict=True) if value.requires_grad]
        self._running_engine_backward = True
        try:
            torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
            self._backward_epilogue()
        finally:
            self._running_engine_backward = False

    def _exec_send_grads(self, buffer_id: int) -> None:
        with self._phases("backward"):
            self.module.send_gradients(self.pipe_buffers["inputs"][buffer_id])
            self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_reduce_tied_grads(self) -> None:
        """The gradient of a weight that several stages have is the sum over them."""
        with self._phases("backward"):
            for weight, places in self.module.shared():
                self.module.add_up(self._summed_gradient(weight), places)

    def _summed_gradient(self, weight: nn.Parameter) -> Tensor:
        """Where the optimizer sums this process's gradient of a weight."""
        if isinstance(self.optimizer, MasterWeights):
            return self.optimizer.sum_of(weight)
        holder = "grad_accum" if getattr(weight, "grad_accum", None) is not None else "grad"
        if isinstance(self.optimizer, BF16_Optimizer):
            holder = "_hp_grad"
        if getattr(weight, holder) is None:
            setattr(weight, holder, torch.zeros_like(weight))
        gradient: Tensor = getattr(weight, holder)
        return gradient

    def _exec_reduce_grads(self) -> None:
        with self._phases("backward"):
            super()._exec_reduce_grads()

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        self._before_update()
        with self._phases("optimizer"):
            super()._exec_optimizer_step(lr_kwargs)

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        """For a pipeline without ZeRO DeepSpeed takes BF16_Optimizer. It is made to take its wrapper of 16-bit weights, which is ours."""
        self.pipeline_parallelism = False
        try:
            return super()._do_optimizer_sanity_check(basic_optimizer)
        finally:
            self.pipeline_parallelism = True

    _INSTRUCTION_MAP = {
        schedule.OptimizerStep: _exec_optimizer_step,
        schedule.ReduceGrads: _exec_reduce_grads,
        schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
        schedule.LoadMicroBatch: _exec_nothing,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.SendActivation: _exec_send_activations,
        schedule.RecvActivation: _exec_nothing,
        schedule.SendGrad: _exec_send_grads,
        schedule.RecvGrad: _exec_recv_grads,
    }
