"""A checkpoint as a model that is ready to run: no DeepSpeed engine, no optimizer; on one process, or on the stages of a pipeline."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from megatron.checkpoint import forward_check
from megatron.checkpoint.agreement import check_architecture, without_free_positions
from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.load import check_args, check_shapes, module_shapes, shapes_of
from megatron.checkpoint.weights import Expected, load_model_weights
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.model import ModelConfig
from megatron.config.neox import NeoXConfig
from megatron.config.section import ConfigError
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.data.tokenizer.companions import folder_of
from megatron.data.tokenizer.eod import find_stop_tokens
from megatron.inference.offload.load import load_offloaded
from megatron.inference.offload.offloaded import Offloaded
from megatron.kernels.precision import DTYPES
from megatron.model import GPT, build_model, choose_implementations
from megatron.model.divide import Divider
from megatron.model.pipeline import build_stage
from megatron.mpu.groups import current_groups
from megatron.training.memory import check_model_fits
from megatron.training.setup import expected_model

log = logging.getLogger(__name__)


class Decoding(NamedTuple):
    """How new tokens are computed."""

    backend: str = "auto"
    """`kernel_backends: {decode: ...}`."""
    weights: Literal["as_saved", "int8"] = "as_saved"


AS_CHOSEN = Decoding()
"""The best that can run, with the weights as they were saved."""


@dataclass(frozen=True)
class ReadyModel:
    """A model on its device, in evaluation mode and without gradients, with its tokenizer and settings.

    iteration: the checkpoint's step. None: the checkpoint does not say it.
    """

    gpt: GPT
    tokenizer: Tokenizer
    sizes: ModelConfig
    device: torch.device
    path: Path
    iteration: int | None
    ends: tuple[int, ...] = ()
    """Ids that end an answer besides the end-of-document token, as the settings beside the tokenizer name them."""
    decoding: Decoding = AS_CHOSEN
    offloaded: Offloaded | None = None
    """What moves the model's experts (`expert_offload`). None: all are resident."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """An answer ends at each of these tokens."""
        return frozenset((*self.ends, *([] if self.tokenizer.eod is None else [self.tokenizer.eod])))

    @property
    def context_length(self) -> int:
        """The largest number of tokens of prompt and answer together: `seq_length`, as in training."""
        return self.sizes.seq_length

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return next(self.gpt.parameters()).dtype

    @property
    def description(self) -> str:
        """Which model this is, for people: path, step, number format, device."""
        step = "" if self.iteration is None else f", step {self.iteration}"
        return f"{self.path}{step}, {str(self.dtype).removeprefix('torch.')} on {self.device}"


def load_ready_model(config: NeoXConfig) -> ReadyModel:
    """The model of the checkpoint that the configuration names (`load`, else `save`; `iteration`, else the newest), on a GPU where there is one.

    On a CPU it runs with `threads_per_process` threads where that is given.
    Raises ConfigError when no directory is named or the checkpoint is of another architecture, CheckpointError when it cannot be read
    or is of another tokenizer, and TokenizerError.
    """
    directory = checkpoint_directory(config.checkpoint)
    if config.launcher.threads_per_process is not None:
        torch.set_num_threads(config.launcher.threads_per_process)
    tokenizer = build_tokenizer(config.data)
    path = find_checkpoint(directory, config.checkpoint.iteration)
    check_architecture(path, config.flat())
    expected = expected_model(config, tokenizer.vocab_size)
    device, vocabulary = choose_device(), expected.args["padded_vocab_size"]
    if config.inference.expert_offload is not None:
        return _offloaded(config, tokenizer, path, expected, device)
    check_model_fits(config, vocabulary, device)
    weights = load_model_weights(path, expected)
    check_args(path, weights.client_state.get("args") or {}, without_free_positions(expected.args, config.model.pos_emb))
    for notice in weights.notices:
        log.info("%s", notice)
    gpt = _build(config, vocabulary).to(device=device, dtype=DTYPES[config.precision])
    own = (
        weights.state_dict
        if gpt.is_first and gpt.is_last
        else {name: weights.state_dict[name] for name in gpt.state_dict() if name in weights.state_dict}
    )
    check_shapes(path, shapes_of(own), module_shapes(gpt))
    gpt.load_state_dict(own)
    choose_implementations(config.model, config.moe, gpt)
    gpt.eval().requires_grad_(False)
    if config.checkpoint.checkpoint_validation_with_forward_pass:
        log.info("%s", _compare_logits(config, gpt, path, weights.client_state.get(forward_check.KEY)))
    stops = find_stop_tokens(tokenizer.token_to_id, folder_of(config.data), tokenizer.eod)
    return ReadyModel(gpt, tokenizer, config.model, device, path, weights.client_state.get("iteration"), stops, _decoding(config))


def _offloaded(config: NeoXConfig, tokenizer: Tokenizer, path: Path, expected: Expected, device: torch.device) -> ReadyModel:
    """The model with its experts in slow memory."""
    if current_groups().pipe.size > 1:
        raise ConfigError(["'expert_offload' needs one process; add -o pipe_parallel_size=0"])
    loaded = load_offloaded(config, path, expected, device)
    choose_implementations(config.model, config.moe, loaded.gpt)
    if config.checkpoint.checkpoint_validation_with_forward_pass:
        log.info("%s", _compare_logits(config, loaded.gpt, path, loaded.client_state.get(forward_check.KEY)))
    stops = find_stop_tokens(tokenizer.token_to_id, folder_of(config.data), tokenizer.eod)
    return ReadyModel(
        loaded.gpt, tokenizer, config.model, device, path, loaded.client_state.get("iteration"), stops, _decoding(config), loaded.offloaded
    )


def _decoding(config: NeoXConfig) -> Decoding:
    return Decoding(config.moe.kernel_backends.get("decode", "auto"), config.inference.inference_weights)


def _build(config: NeoXConfig, vocabulary: int) -> GPT:
    """The model, or this process's stage of it."""
    groups = current_groups()
    if groups.pipe.size == 1:
        return build_model(config.model, config.moe, vocabulary, seed=0)
    return build_stage(config.model, config.moe, vocabulary, seed=0, method=config.parallel.pipe_partition_method, divider=Divider(groups))


def _compare_logits(config: NeoXConfig, gpt: GPT, path: Path, stored: Any) -> str:
    weight = next(gpt.parameters())

    def run(tokens_BS: torch.Tensor) -> torch.Tensor:
        logits_BSV = gpt(tokens_BS.to(weight.device)).logits_BSV
        assert logits_BSV is not None
        return logits_BSV

    limits = {"positions": config.model.seq_length, "vocabulary": gpt.vocab_size}
    return forward_check.check_validation_logits(path, stored, run, **limits, dtype=weight.dtype)


def checkpoint_directory(checkpoint: CheckpointConfig) -> Path:
    """The directory of the model. Raises ConfigError if the configuration names no directory."""
    directory = checkpoint.load or checkpoint.save
    if directory is None:
        raise ConfigError(["'load' must be given: the directory with the checkpoint (without it, `save` is used)"])
    return Path(directory)


def choose_device() -> torch.device:
    """The first GPU. The CPU if there is no GPU, or if DS_ACCELERATOR=cpu is set."""
    use_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda" if use_gpu else "cpu")
