"""Whole training runs against diffusers' research script: time, memory and win rates."""

from .command import main

__all__ = ["main"]
