"""StructMoE-NeoX: GPT-NeoX-compatible training of mixture-of-experts language models."""

__version__ = "0.1.0"
