"""``diffusion-align data``: new data sets from old ones: ``data relabel`` and ``data lists``."""

from __future__ import annotations

from diffusion_align.commands.options import RelabelOptions
from diffusion_align.commands.parsing import asks_for_help, parse_options, unknown

from .list_options import ListsOptions

#: Words that follow, and what the help says of them.
WORDS = {"relabel": "label existing pairs by a scorer", "lists": "make ranked lists of the pairs of one prompt"}


def parse(arguments: list[str]) -> RelabelOptions | ListsOptions:
    """Options of the word that comes first.

    Raises:
        ValueError: another word, or an option that is wrong.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    if asks_for_help(arguments):
        lines = [f"  {word:<9}{text}" for word, text in WORDS.items()]
        print("\n".join([f"usage: diffusion-align data {'|'.join(WORDS)} [--FLAG VALUE ...]", "", *lines]))
        raise SystemExit(0)
    word, *rest = arguments
    if word not in WORDS:
        raise ValueError(unknown("data command", word, WORDS))
    if word == "lists":
        return parse_options(ListsOptions, "data lists", rest, bare="--source")
    return parse_options(RelabelOptions, "data relabel", rest, bare="--source")


def run(options: RelabelOptions | ListsOptions) -> int:
    """Make the data set and say what became of the old one; returns the exit status."""
    if isinstance(options, ListsOptions):
        from .making_lists import write_lists

        return write_lists(options)
    from .relabelling_any import relabel_any

    return relabel_any(options)
