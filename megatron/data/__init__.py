"""From text to batches. Files here: `.bin/.idx` data, its splits, blending and loading; and shared code: locks, staging, caches, progress.

input/          How do files become documents?
corpus/         Where does text come from?
tokenizer/      How does text become token ids, and token ids text?
preprocessing/  How do documents become token files?
sample/         Which tokens make sample i?
builders/       Who computes the order of samples: compiled code or NumPy?

Formats and orders are exactly GPT-NeoX's: each program reads the other's files, and a run sees the same samples in the same order. Only
`sample.samples`, the modules that use it, and `loader` import torch.
"""
