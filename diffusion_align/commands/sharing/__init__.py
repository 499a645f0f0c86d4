"""``diffusion-align card`` and ``push``: what a run is, written down for others, and sent to the hub."""

from __future__ import annotations

from functools import partial

from diffusion_align.commands.parsing import parse_options

from .sharing_options import CardOptions, PushOptions

#: From arguments to checked options.
parse_card = partial(parse_options, CardOptions, "card", bare="--run")


def parse_push(arguments: list[str]) -> PushOptions:
    """Options of push, whose first two words are the run and the repository.

    Raises:
        ValueError: options that do not fit each other.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    if len(arguments) > 1 and not arguments[0].startswith("-") and not arguments[1].startswith("-"):
        arguments = ["--run", arguments[0], "--repo", *arguments[1:]]
    return parse_options(PushOptions, "push", arguments, bare="--run")


def run(options: CardOptions | PushOptions) -> int:
    """Write the card, or send what may be sent; returns the exit status."""
    if isinstance(options, PushOptions):
        from .hub import run_push

        return run_push(options)
    from .card import run_card

    return run_card(options)
