"""Our groups as DeepSpeed asks for them: the `mpu` object of `deepspeed.initialize`, by its names."""

from __future__ import annotations

from typing import Any

from megatron.mpu.groups import Groups


class DeepSpeedMpu:
    """What DeepSpeed calls model parallel are all processes that hold one copy of the model; `tensor_model_parallel` those that share a layer."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def get_model_parallel_rank(self) -> int:
        """In a copy of the model."""
        return self.groups.model.rank

    def get_model_parallel_world_size(self) -> int:
        """Processes that hold one copy."""
        return self.groups.model.size

    def get_model_parallel_group(self) -> Any:
        """PyTorch's group."""
        return self.groups.model.handle

    def get_tensor_model_parallel_rank(self) -> int:
        """In a layer."""
        return self.groups.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Processes that share a layer."""
        return self.groups.tensor.size

    def get_tensor_model_parallel_group(self) -> Any:
        """PyTorch's group."""
        return self.groups.tensor.handle

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Stages."""
        return self.groups.pipe.size

    def get_pipeline_model_parallel_group(self) -> Any:
        """PyTorch's group."""
        return self.groups.pipe.handle

    def get_pipe_parallel_group(self) -> Any:
        """PyTorch's group."""
        return self.groups.pipe.handle

    def get_data_parallel_rank(self) -> int:
        """Among the replicas."""
        return self.groups.data.rank

    def get_data_parallel_world_size(self) -> int:
        """Replicas."""
        return self.groups.data.size

    def get_data_parallel_group(self) -> Any:
        """PyTorch's group."""
        return self.groups.data.handle

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The ranks of the replicas of this process's part."""
        return list(self.groups.data.ranks)


def tell_deepspeed(groups: Groups, name: str) -> None:
    """Puts the expert-parallel groups where DeepSpeed looks for them, under `name`."""
    from deepspeed.utils import groups as theirs

    theirs._EXPERT_PARALLEL_GROUP[name] = groups.expert.handle
    theirs._EXPERT_PARALLEL_GROUP_RANKS[name] = list(groups.expert.ranks)
    theirs._EXPERT_DATA_PARALLEL_GROUP[name] = groups.expert_data.handle
    theirs._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(groups.expert_data.ranks)
    theirs.expert_tensor_parallel_world_size = groups.tensor.size
