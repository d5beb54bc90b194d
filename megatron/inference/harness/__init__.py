"""The tasks of EleutherAI's lm-evaluation-harness on our models.

tasks.py            names of tasks, and where their data come from
requests.py         what a task asks, as rows of tokens
likelihood.py       log-likelihoods of many rows in batches
answers.py          generated answers
language_model.py   the harness's interface; the only file that imports lm_eval at the top
forward.py          how a model computes: alone, or as a part of a training run
run.py              one evaluation from the names to the results
"""
