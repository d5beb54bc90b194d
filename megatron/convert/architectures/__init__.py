"""A table for each of Hugging Face's architectures; the list says which is tried first."""

from __future__ import annotations

from megatron.convert.architecture import Architecture
from megatron.convert.architectures.gpt_neox import GPTNeoX
from megatron.convert.architectures.llama import Llama, Mistral, Olmo, Olmo2, Qwen2, Qwen3
from megatron.convert.architectures.mixture import Glm4Moe, Mixtral, Olmoe, Qwen2Moe, Qwen3Moe
from megatron.convert.architectures.structmoe import StructMoE

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        GPTNeoX(),
        Llama(),
        Mistral(),
        Olmo(),
        Olmo2(),
        Qwen2(),
        Qwen3(),
        Mixtral(),
        Qwen3Moe(),
        Qwen2Moe(),
        Olmoe(),
        Glm4Moe(),
        StructMoE(),
    )
}
"""`--architecture` -> the table."""
