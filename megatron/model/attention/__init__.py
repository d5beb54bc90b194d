"""Causal self-attention: `self_attention.py` reads top to bottom, `rotary.py` and `cache.py` are what it stands on."""

from megatron.model.attention.cache import CacheError, LayerCache, build_cache
from megatron.model.attention.self_attention import SelfAttention

__all__ = ["CacheError", "LayerCache", "SelfAttention", "build_cache"]
