"""Dispatchers: bring every token to its experts and the results back."""
