"""Saving and resuming."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron.config.section import NaturalInt, PositiveInt, Problem, Section


class CheckpointConfig(Section):
    save: str | None = None
    """Directory that checkpoints are written to. None: nothing is saved."""
    load: str | None = None
    """Directory to start from: the checkpoint that its `latest` names, or `iteration`. None: start from new weights."""
    resume_if_exists: bool = False
    """Continue from the checkpoint that `save`/latest names. When `save` holds none, start from `load`, or from the beginning where that is not given
    or the same directory. If that checkpoint is damaged, the run stops and names the newest whole one."""
    finetune: bool = False
    """Take only the weights from `load`: step 0, fresh optimizer and random state."""
    iteration: NaturalInt | None = None
    """Step of the checkpoint to load. None: the one that `latest` names."""
    checkpoint_factor: float | None = None
    """Linear scale: save every so many steps. Log scale: save at the powers of this. None: only `extra_save_iters` and the end."""
    checkpoint_scale: Literal["linear", "log"] = "linear"
    """How `checkpoint_factor` is read."""
    extra_save_iters: list[int] | None = None
    """Further steps to save at; 0 saves the initial weights. None: none."""
    keep_last_n_checkpoints: PositiveInt | None = None
    """Older checkpoints than the last n are deleted; the newest one before which no loss was NaN or infinite always stays. None: all are kept."""
    gqa_layout: Literal["auto", "q,k,v", "per_head"] = "auto"
    """Order of the rows of grouped query/key/value projections in GPT-NeoX's checkpoints, which do not say it: all queries, all keys, all values
    (since November 2024) or head by head (before). auto: look at the weights. This program's own checkpoints say it themselves."""
    checkpoint_validation_with_forward_pass: bool = False
    """Save the logits of a fixed input with each checkpoint, and compare them after loading."""
    no_load_optim: bool = False
    """Do not load the optimizer's state."""
    no_load_rng: bool = False
    """Do not load the state of the random generators."""
    no_save_optim: bool = False
    """Do not save the optimizer's state: a run can go on from such a checkpoint only with `no_load_optim`."""
    no_save_rng: bool = False
    """Do not save the state of the random generators."""

    def check(self) -> Iterator[Problem]:
        factor = self.checkpoint_factor
        if self.save is not None and factor is None and self.extra_save_iters is None:
            yield Problem(("save",), "needs checkpoint_factor or extra_save_iters: the steps at which to save")
        if factor is not None and self.checkpoint_scale == "linear" and (factor < 1 or factor != int(factor)):
            yield Problem(("checkpoint_factor",), "must be a whole number of steps, 1 or more")
        if factor is not None and self.checkpoint_scale == "log" and factor <= 1:
            yield Problem(("checkpoint_factor", "checkpoint_scale"), "must be more than 1 with checkpoint_scale: log")
        if any(step < 0 for step in self.extra_save_iters or []):
            yield Problem(("extra_save_iters",), "must be steps of 0 or more")
        if self.finetune and self.load is None:
            yield Problem(("finetune", "load"), "needs load: the directory whose weights to start from")
        if self.resume_if_exists and self.save is None:
            yield Problem(("resume_if_exists", "save"), "needs save: the directory to look in")
