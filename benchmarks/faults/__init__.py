"""``python -m benchmarks faults``: what is left of runs that are killed at random instants."""

from .command import main

__all__ = ["main"]
