"""Answers about models from their configurations and results."""
