"""How do documents become token files? `prepare_data.py` and `tools/datasets`: encoding on several processes, writing, merging."""
