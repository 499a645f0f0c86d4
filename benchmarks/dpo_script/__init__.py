"""Whole training runs against diffusers' research script: time, memory and win rates."""

from __future__ import annotations


def main(argv: list[str]) -> None:
    from .command import main as run  # the timed child is in this folder, too, and must import nothing heavy

    run(argv)
