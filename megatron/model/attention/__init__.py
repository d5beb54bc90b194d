"""Causal self-attention. Begin with `self_attention.py`. `split.py` makes queries, keys and values. `mask.py` says which keys a query sees.
`sdpa.py` and `flash.py` compute, `choice.py` chooses between them, and `cache.py` keeps keys and values.
"""

from megatron.model.attention.cache import CacheError, LayerCache, build_cache
from megatron.model.attention.self_attention import SelfAttention

__all__ = ["CacheError", "LayerCache", "SelfAttention", "build_cache"]
