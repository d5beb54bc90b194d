"""Faults that a run's own numbers show. Pure rules on numbers: each rule is a class that is given every step and returns alerts."""
