"""Models to Hugging Face and back: one engine (`mapping.py`), one table for each architecture (`architectures/`)."""
