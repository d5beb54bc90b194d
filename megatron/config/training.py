"""Number of steps, batch sizes, evaluation and recomputation of activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from megatron.config.parallel import ParallelConfig
from megatron.config.section import ConfigError, NaturalInt, PositiveInt, Problem, Section, Seed

RecomputedModule = Literal["attention", "mlp", "moe", "experts"]


class ActivationCheckpointing(Section):
    partition_activations: bool = False
    """As the key `partition_activations`."""
    cpu_checkpointing: bool = False
    """As the key `checkpoint_in_cpu`."""
    contiguous_memory_optimization: bool = False
    """Without effect: PyTorch's allocator places the kept inputs."""
    number_checkpoints: PositiveInt | None = None
    """Without effect: it is for contiguous_memory_optimization."""
    synchronize_checkpoint_boundary: bool = False
    """Without effect: waiting for the GPU at each layer changes no result."""
    profile: bool = False
    """Without effect: `profile` records the times of a step."""


class TrainingConfig(Section):
    train_iters: PositiveInt | None = None
    """Number of optimizer steps of the whole training. None: the number that `train_epochs` needs. If both are None, only generation and
    evaluation are possible."""
    train_epochs: PositiveInt | None = None
    """Number of passes through the training data, instead of `train_iters`. Several corpora are mixed in proportion to their lengths. None:
    `train_iters` decides."""
    train_batch_size: PositiveInt | None = None
    """Sequences in one optimizer step over all processes: micro-batch size * accumulation steps * processes. None: computed from the other two
    keys."""
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    """Micro-batch size: the sequences that one process takes through the model at a time. None: computed from `train_batch_size` and
    `gradient_accumulation_steps`."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches of one process in one optimizer step. None: computed from `train_batch_size` and `train_micro_batch_size_per_gpu`; 1 if only
    one of them is given."""
    seed: Seed = 1234
    """Seed of the initial weights, of dropout and of the order of the data."""
    eval_interval: PositiveInt = 1000
    """Steps between evaluations on the validation data."""
    eval_iters: NaturalInt = 100
    """Number of batches in one evaluation. Each has the size of a training batch. 0: no evaluation. If `valid_data_paths` or `test_data_paths`
    name several corpora, the batches are mixed by the weights of the corpora. The loss of each corpus comes from its part of these batches."""
    extra_eval_iters: list[NaturalInt] | None = None
    """Additional steps after which to evaluate; 0 evaluates the initial weights. None: no additional steps."""
    calculate_per_token_loss: bool = True
    """How the loss is averaged when labels or `eod_mask_loss` leave tokens out of it. True: the losses of all counted tokens in all micro-batches
    and processes are summed, and the sum is divided by their number. This holds for training, its gradients and validation. False: GPT-NeoX's mean
    of the micro-batches' means. A micro-batch with few counted tokens then weighs as much as one with many."""
    checkpoint_activations: bool = False
    """Recompute whole layers: only the inputs of layers are kept, and the backward pass computes all other values again. Losses and gradients stay
    the same."""
    checkpoint_num_layers: PositiveInt = 1
    """Layers that are recomputed together with `checkpoint_activations`. Only the input of every n-th layer is kept. The last group may be
    smaller."""
    recompute_modules: list[RecomputedModule] = []
    """Recompute these parts of every layer, and keep the rest (selective recomputation, as Megatron-Core's key of this name). attention: from
    queries, keys and values to the output projection. mlp: the MLP of layers without experts. moe: a whole MoE layer, the router included.
    experts: only the routed experts, which keep their sorted rows; nothing is sent again. Empty: none."""
    partition_activations: bool = False
    """With `checkpoint_activations`: the processes that share a layer (`model_parallel_size`) divide the kept inputs among them, and gather them for
    the backward pass."""
    checkpoint_in_cpu: bool = False
    """With `checkpoint_activations`: the kept inputs are in the CPU's memory until the backward pass."""
    activation_checkpointing: ActivationCheckpointing | None = None
    """DeepSpeed's dictionary: {partition_activations, cpu_checkpointing}, with the meaning of the two keys before. It does not turn recomputation on.
    None: not used."""
    exit_interval: PositiveInt | None = None
    """Save and stop at each step that is a multiple of this. None: run until `train_iters`."""
    max_nonfinite_steps: PositiveInt = 20
    """The run stops after this many steps in a row with a NaN or infinite loss or gradient. Each such step is skipped, and none of them becomes a
    checkpoint."""

    @property
    def divides_kept_inputs(self) -> bool:
        """Whether tensor-parallel processes divide the inputs of recomputed layers."""
        given = self.activation_checkpointing
        return self.partition_activations or (given is not None and given.partition_activations)

    @property
    def keeps_inputs_on_cpu(self) -> bool:
        """Whether the inputs of recomputed layers are kept in the CPU's memory."""
        given = self.activation_checkpointing
        return self.checkpoint_in_cpu or (given is not None and given.cpu_checkpointing)

    def idle_keys(self, parallel: ParallelConfig, *, has_experts: bool) -> Iterator[tuple[str, str]]:
        """(key, what to say of it) for keys of recomputation that were given and have no effect."""
        both = (("partition_activations", "partition_activations"), ("checkpoint_in_cpu", "cpu_checkpointing"))
        for key, inner in both:
            names = [key] if getattr(self, key) else []
            if self.activation_checkpointing is not None and getattr(self.activation_checkpointing, inner):
                names.append(f"activation_checkpointing.{inner}")
            for name in names:
                if not self.checkpoint_activations:
                    yield name, "has no effect: it is about the inputs that checkpoint_activations: true keeps"
                elif key == "partition_activations" and parallel.model_parallel_size == 1:
                    yield name, "has no effect: model_parallel_size is 1, so there are no processes to divide the kept inputs among"
                elif key == "partition_activations" and parallel.sequence_parallel:
                    yield name, "has no effect: with sequence_parallel: true each process has its own part of the inputs anyway"
        for inner, reason in _IDLE.items():
            if self.activation_checkpointing is not None and getattr(self.activation_checkpointing, inner):
                yield f"activation_checkpointing.{inner}", f"has no effect here: {reason}"
        for name in sorted({"moe", "experts"} & set(self.recompute_modules)) if not has_experts else ():
            yield "recompute_modules", f"names {name}, and no layer has experts"

    def check(self) -> Iterator[Problem]:
        yield from self._recompute_problems()
        if self.train_iters is not None and self.train_epochs is not None:
            yield Problem(("train_epochs", "train_iters"), f"give either it or train_iters ({self.train_iters}), not both")
        total, micro, steps = self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps
        per_process = (micro or 1) * (steps or 1)
        if total is not None and total % per_process:
            parts = [("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", steps)]
            given = [(key, value) for key, value in parts if value is not None]
            product = " * ".join(f"{key} ({value})" for key, value in given)
            yield Problem(("train_batch_size", *(key for key, _ in given)), f"must be a multiple of {product}")

    def _recompute_problems(self) -> Iterator[Problem]:
        modules = self.recompute_modules
        if modules and self.checkpoint_activations:
            yield Problem(
                ("recompute_modules", "checkpoint_activations"),
                "checkpoint_activations: true recomputes whole layers already; remove one of the two",
            )
        if len(set(modules)) < len(modules):
            yield Problem(("recompute_modules",), "names a module twice")
        if "moe" in modules and "experts" in modules:
            yield Problem(("recompute_modules",), "moe contains experts; name one of them")


_IDLE = {
    "contiguous_memory_optimization": "PyTorch's allocator places the kept inputs",
    "number_checkpoints": "it is for contiguous_memory_optimization",
    "synchronize_checkpoint_boundary": "it makes the process wait for the GPU at each layer, and the results are the same",
    "profile": "write profile: true, which records the times of a step",
}
"""Entry of `activation_checkpointing` -> why it does nothing."""


class Batch(NamedTuple):
    """Sequences per process and forward pass, forward passes per optimizer step, sequences per optimizer step over all processes."""

    micro: int
    accumulation: int
    global_: int


def resolve_batch(training: TrainingConfig, data_parallel_size: int) -> Batch:
    """All three batch numbers, computed from any two of them. If one is given, there is one accumulation step.

    Raises ConfigError when neither the batch nor the micro batch is given, or when the numbers do not multiply out for that many processes.
    """
    total, micro, steps = training.train_batch_size, training.train_micro_batch_size_per_gpu, training.gradient_accumulation_steps
    if total is None and micro is None:
        raise ConfigError(["'train_micro_batch_size_per_gpu' or 'train_batch_size' must be given (sequences per process, or per step in all)"])
    if micro is None:
        micro = (total or 0) // ((steps or 1) * data_parallel_size)
    elif steps is None and total is not None:
        steps = total // (micro * data_parallel_size)
    steps = 1 if steps is None else steps
    product = micro * steps * data_parallel_size
    if product == 0 or (total is not None and total != product):
        raise ConfigError([_mismatch(training, data_parallel_size)])
    return Batch(micro, steps, product)


def _mismatch(training: TrainingConfig, data_parallel_size: int) -> str:
    parts = {
        "train_micro_batch_size_per_gpu": training.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "data-parallel processes": data_parallel_size,
    }
    given = {name: value for name, value in parts.items() if value is not None}
    product = " * ".join(f"{name} ({value})" for name, value in given.items())
    relation = "equal" if len(given) == len(parts) else "be a multiple of"
    return f"'train_batch_size' = {training.train_batch_size}: must {relation} {product}"
