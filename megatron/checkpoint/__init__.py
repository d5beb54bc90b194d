"""Checkpoints in GPT-NeoX's layout: written whole or not at all, checked before loading.

Only `save` and `engine` import DeepSpeed.
"""
