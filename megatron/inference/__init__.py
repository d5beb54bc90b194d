"""Using a trained model: loading it without DeepSpeed, continuing text, measuring held-out text.

model.py       a checkpoint as a model that is ready to run, with its tokenizer
sampling.py    the choice of the next token: pure functions
runner.py      adds tokens to several texts; routing_trace.py   which experts they went to
decoder/       new tokens by compiled code      offload/   experts in slow memory      serve/   the HTTP server
continuation.py   one prompt to one text, with a key/value cache of its own
prompts.py     where prompts come from; samples.py   where texts go; session.py   what generate.py does with both
score.py       loss, perplexity and bits per byte; evaluation.py   what eval.py does with them
"""
