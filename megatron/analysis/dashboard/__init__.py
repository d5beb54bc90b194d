"""A page that shows runs while they train: reads their metrics.jsonl, thins it out, draws it."""
