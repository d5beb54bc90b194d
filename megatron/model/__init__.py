"""The model: `gpt.py` is the list of layers, `layer.py` one of them; attention, MLP and MoE are what a layer is made of."""

from megatron.model.attention import LayerCache, build_cache
from megatron.model.attention.choice import choose_attention
from megatron.model.gpt import GPT, GPTOutput, build_model
from megatron.model.implementations import choose_implementations

__all__ = ["GPT", "GPTOutput", "LayerCache", "build_cache", "build_model", "choose_attention", "choose_implementations"]
