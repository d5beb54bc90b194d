"""Experts: what happens to the rows that each expert was given, one kind a file. No routing between experts, no communication."""
