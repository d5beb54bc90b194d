"""Saving checkpoints, and continuing from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron.config.section import NaturalInt, PositiveInt, Problem, Section


class CheckpointConfig(Section):
    save: str | None = None
    """Directory for checkpoints. None: nothing is saved."""
    load: str | None = None
    """Directory to load a checkpoint from: the one of step `iteration`, or the one that the file `latest` names. None: start from new weights."""
    resume_if_exists: bool = False
    """Continue from the checkpoint that the file `latest` in `save` names. If `save` has no checkpoint, start from `load`. If `load` is not given
    or is the same directory, start from new weights. If the checkpoint is damaged, the run stops and names the newest undamaged one."""
    finetune: bool = False
    """Take only the weights from `load`. The run starts at step 0 with a new optimizer state and a new random state."""
    iteration: NaturalInt | None = None
    """Step of the checkpoint to load. None: the step that the file `latest` names."""
    checkpoint_factor: float | None = None
    """When to save. Linear scale: every this many steps. Log scale: at each power of this number. None: only at `extra_save_iters` and at the end."""
    checkpoint_scale: Literal["linear", "log"] = "linear"
    """Scale of `checkpoint_factor`."""
    extra_save_iters: list[int] | None = None
    """Additional steps to save at; 0 saves the initial weights. None: no additional steps."""
    keep_last_n_checkpoints: PositiveInt | None = None
    """Number of checkpoints to keep; older ones are deleted. The newest checkpoint without a NaN or infinite loss before it is never deleted.
    None: all are kept."""
    gqa_layout: Literal["auto", "q,k,v", "per_head"] = "auto"
    """How a GPT-NeoX checkpoint orders the rows of grouped query/key/value projections; the checkpoint itself does not say it. q,k,v: all queries,
    all keys, all values (since November 2024). per_head: head by head (before). auto: the weights decide. Checkpoints of this program contain the
    order."""
    checkpoint_validation_with_forward_pass: bool = False
    """Save the logits of a fixed input with each checkpoint, and compare them after loading."""
    no_load_optim: bool = False
    """Do not load the optimizer's state."""
    no_load_rng: bool = False
    """Do not load the state of the random generators."""
    no_save_optim: bool = False
    """Do not save the optimizer's state. A run can continue from such a checkpoint only with `no_load_optim`."""
    no_save_rng: bool = False
    """Do not save the state of the random generators."""

    def check(self) -> Iterator[Problem]:
        factor = self.checkpoint_factor
        if self.save is not None and factor is None and self.extra_save_iters is None:
            yield Problem(("save",), "needs checkpoint_factor or extra_save_iters, which say when to save")
        if factor is not None and self.checkpoint_scale == "linear" and (factor < 1 or factor != int(factor)):
            yield Problem(("checkpoint_factor",), "must be a whole number of steps, 1 or more")
        if factor is not None and self.checkpoint_scale == "log" and factor <= 1:
            yield Problem(("checkpoint_factor", "checkpoint_scale"), "must be more than 1 with checkpoint_scale: log")
        if any(step < 0 for step in self.extra_save_iters or []):
            yield Problem(("extra_save_iters",), "must be a list of step numbers, each 0 or more")
        if self.finetune and self.load is None:
            yield Problem(("finetune", "load"), "needs load, the directory with the weights to start from")
        if self.resume_if_exists and self.save is None:
            yield Problem(("resume_if_exists", "save"), "needs save, the directory with the checkpoints")
