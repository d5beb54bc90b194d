"""From text to batches. Files here: `.bin/.idx` data, its splits, blending and loading; and what all share: locks, staging, caches, progress.

input/          How do files become documents?
corpus/         Where does text come from?
tokenizer/      How does text become token ids, and token ids text?
preprocessing/  How do documents become token files?
sample/         Which tokens make sample i?
builders/       Who computes the order of samples: compiled code or NumPy?

Formats and orders are GPT-NeoX's, digit for digit: a file written there is read here and the other way round, and a run
sees the same samples in the same order. Nothing here imports torch except `sample.samples`, what is made of them, and `loader`.
"""
