"""Corpora that other programs have tokenised, to and from `.bin/.idx`. A format is one file and one line in `FORMATS` (importing.py)."""
