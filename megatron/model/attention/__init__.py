"""Causal self-attention. `self_attention.py` reads top to bottom; `split.py` makes queries, keys and values, `mask.py` says who sees whom,
`sdpa.py` and `flash.py` compute, `choice.py` chooses between them, `cache.py` remembers.
"""

from megatron.model.attention.cache import CacheError, LayerCache, build_cache
from megatron.model.attention.self_attention import SelfAttention

__all__ = ["CacheError", "LayerCache", "SelfAttention", "build_cache"]
