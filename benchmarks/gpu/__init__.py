"""``python -m benchmarks gpu``: what one GPU says of the product, in one command of a few minutes."""

from .command import main

__all__ = ["main"]
