"""From text to batches: corpora, tokenizers, `.bin/.idx` files, sample order, loading.

Formats and orders are GPT-NeoX's, digit for digit: a file written there is read here and the other way round, and a run
sees the same samples in the same order. Nothing here imports torch except `samples`, what is made of them, and `loader`.
"""
