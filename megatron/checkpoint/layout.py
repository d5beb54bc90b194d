"""The names inside a checkpoint directory; the only file that knows them.

GPT-NeoX's layout, with our own files beside it:

    <save>/latest                                        text: global_step100
    <save>/global_step100/
        mp_rank_00_model_states.pt                       weights and client state (ZeRO 0 to 2)
        layer_02-model_00-model_states.pt                with pipe_parallel_size 1 or more: the weights of layer 2, then not in the file above
        [bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt one for each data-parallel rank (ZeRO 1 to 3)
        zero_pp_rank_0_mp_rank_00_model_states.pt        one for each data-parallel rank (ZeRO 3), instead of the first
        rng_state_rank_01.pt                             random states of the ranks above 0
        part_of_rank_03_model_states.pt                  experts of a rank above 0 that share them (our own)
        layer_02-optim_states.pt                         optimizer state of layer 2, whole, as tools/ckpts/reshape.py writes it (our own)
        configs/<original>.yml, configs/resolved.json
        division.json                                    which rank wrote each file, and which part of every weight it held
        manifest.json                                    size and SHA-256 of every file above, a checksum of every tensor; written last
    <save>/.incomplete/global_step100/                   a checkpoint being written: renamed to its place when whole
    <save>/.global_step100.replaced                      a checkpoint of the same step that is just being replaced
    <save>/.global_step100.deleting                      a checkpoint that retention is deleting
    <save>/.lock                                         held by the run that writes here
    <save>/suspect/                                      laid out as <save>: the last checkpoint that is in doubt, for whoever looks for the cause

Other programs' checkpoints may be cut up among tensor-parallel processes: model_01, mp_rank_01 and so on. With a pipeline the numbers of mp_rank
count all processes that share the model, those of model_ the tensor-parallel ones.
"""

from __future__ import annotations

import re
from pathlib import Path

RESHAPED = "reshaped"
"""In a manifest: no run saved it in this form."""
STATES = "optimizer_states"
"""In a file of a part: optimizer state by name."""
LATEST = "latest"
MANIFEST = "manifest.json"
DIVISION = "division.json"
TENSORS = "tensors"
"""In a manifest: checksums by name of weight and kind of tensor."""
CONFIGS = "configs"
RESOLVED_CONFIG = "resolved.json"
LOCK = ".lock"
STAGING = ".incomplete"
SUSPECT = "suspect"
LOSSES_FINITE = "losses_finite"
"""In a manifest: whether every loss since the checkpoint before was finite. Not there: not known."""

TAG_PATTERN = re.compile(r"global_step(\d+)")
MODEL_FILE_PATTERN = re.compile(r"mp_rank_(\d+)_model_states\.pt")
ZERO3_MODEL_FILE_PATTERN = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
OPTIMIZER_FILE_PATTERN = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
LAYER_FILE_PATTERN = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
PART_FILE_PATTERN = re.compile(r"part_of_rank_(\d+)_model_states\.pt")
LAYER_OPTIMIZER_FILE_PATTERN = re.compile(r"layer_(\d+)-optim_states\.pt")
PARAMETER_PATTERN = re.compile(r"sequential\.(\d+)\.(.+)")
"""A weight's name in a model file: the number of its layer and its name in a layer file."""

GQA_LAYOUT_KEY, GQA_LAYOUT = "gqa_layout", "q,k,v"
"""Client state that says how query_key_value is laid out under grouped-query attention; GPT-NeoX's own checkpoints do not say it."""

ORIGIN_KEY = "huggingface_architecture"
"""Client state of an import from Hugging Face and of what is trained from it: the name of the table that read it."""

# What DeepSpeed itself stores beside the client state in a model file.
DEEPSPEED_KEYS = frozenset(
    (
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "csr_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "ds_config",
        "ds_version",
        "num_experts",
        "checkpoint_parallel_dimensions",
        "universal_checkpoint_info",
    )
)


def tag(iteration: int) -> str:
    """The directory name of an iteration, as NeoX writes it."""
    return f"global_step{iteration}"


def iteration_of(name: str) -> int | None:
    """The iteration a directory name stands for; None when it is no checkpoint's name."""
    match = TAG_PATTERN.fullmatch(name)
    return int(match.group(1)) if match else None


def staging(directory: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return directory / STAGING


def replaced(directory: Path, iteration: int) -> Path:
    """Where a whole checkpoint waits while a new one of the same step takes its place."""
    return directory / f".{tag(iteration)}.replaced"


def deleting(directory: Path, iteration: int) -> Path:
    """Where retention moves a checkpoint before it deletes it file by file."""
    return directory / f".{tag(iteration)}.deleting"


def model_file(rank: int) -> str:
    """The file with the weights (or, beside layer files, without them) and the client state of a tensor-parallel rank."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def layer_file(layer: int, rank: int) -> str:
    """The file with the weights of one layer of a tensor-parallel rank."""
    return f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def part_file(rank: int) -> str:
    """The file of a rank above 0 with what only it and its copies hold."""
    return f"part_of_rank_{rank:02d}_model_states.pt"


def layer_optimizer_file(layer: int) -> str:
    """The file with the whole optimizer state of one layer."""
    return f"layer_{layer:02d}-optim_states.pt"


def random_state_file(rank: int) -> str:
    """The file with the random states of a rank above 0 (rank 0's are in the client state)."""
    return f"rng_state_rank_{rank:02d}.pt"


def matching_files(path: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of one kind in a checkpoint, in the order of the numbers in their names."""
    found = [(tuple(int(group) for group in match.groups()), file) for file in path.iterdir() if (match := pattern.fullmatch(file.name))]
    return [file for _, file in sorted(found)]


def looks_like_checkpoint(path: Path) -> bool:
    """Whether the directory holds weights in any of the layouts that NeoX writes."""
    patterns = (MODEL_FILE_PATTERN, ZERO3_MODEL_FILE_PATTERN, LAYER_FILE_PATTERN)
    return path.is_dir() and any(pattern.fullmatch(file.name) for file in path.iterdir() for pattern in patterns)


def iterations_in(directory: Path) -> list[int]:
    """The steps that have a directory here, whole or not, ascending."""
    if not directory.is_dir():
        return []
    steps = {step for entry in directory.iterdir() if entry.is_dir() and (step := iteration_of(entry.name)) is not None}
    steps |= {int(match.group(1)) for entry in directory.iterdir() if (match := re.fullmatch(r"\.global_step(\d+)\.replaced", entry.name))}
    return sorted(steps)


def path_of(directory: Path, iteration: int) -> Path:
    """The directory of a step; the one being replaced when a kill fell between the two renames."""
    path, aside = directory / tag(iteration), replaced(directory, iteration)
    return aside if not path.exists() and aside.exists() else path
