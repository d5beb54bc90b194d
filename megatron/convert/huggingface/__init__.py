"""Code that is copied into exports as it stands: it imports torch, transformers and its own folder, and nothing of this package."""
