"""``diffusion-align data``: new data sets from old ones, and looking after those that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

from diffusion_align.commands.options import Options, RelabelOptions
from diffusion_align.commands.parsing import asks_for_help, parse_options, unknown

from .list_options import ListsOptions
from .pair_options import CheckOptions, DedupOptions, ImportOptions, PairExportOptions, SplitOptions, StatsOptions


@dataclass(frozen=True)
class Word:
    """A word that may follow.

    Attributes:
        text: what the help says of it.
        options: their class.
        runner: who does it, "module:function" of this package.
    """

    text: str
    options: type[Options]
    runner: str


WORDS: Mapping[str, Word] = MappingProxyType(
    {
        "import": Word("read a published preference set or another program's folder", ImportOptions,
                       "pair_sets:run_import"),
        "export": Word("write pairs for other programs", PairExportOptions, "pair_sets:run_export"),
        "check": Word("look for torn pictures, leaks between splits, contradictions", CheckOptions,
                      "pair_sets:run_check"),
        "dedup": Word("find, and leave out, pairs that say nothing new", DedupOptions, "pair_sets:run_dedup"),
        "stats": Word("count labels, ties, prompts, people, models", StatsOptions, "pair_sets:run_stats"),
        "split": Word("part a data set into splits that share nothing", SplitOptions, "pair_sets:run_split"),
        "relabel": Word("label existing pairs by a scorer", RelabelOptions, "relabelling_any:relabel_any"),
        "lists": Word("make ranked lists of the pairs of one prompt", ListsOptions, "making_lists:write_lists"),
    }
)  # fmt: skip


def parse(arguments: list[str]) -> Options:
    """Options of the word that comes first.

    Raises:
        ValueError: another word, or an option that is wrong.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    if asks_for_help(arguments):
        lines = [f"  {word:<9}{known.text}" for word, known in WORDS.items()]
        print("\n".join([f"usage: diffusion-align data {'|'.join(WORDS)} [--FLAG VALUE ...]", "", *lines]))
        raise SystemExit(0)
    word, *rest = arguments
    if word not in WORDS:
        raise ValueError(unknown("data command", word, WORDS))
    return parse_options(WORDS[word].options, f"data {word}", rest, bare="--source")


def run(options: Options) -> int:
    """Do what the word says; returns the exit status."""
    word = next(known for known in WORDS.values() if type(options) is known.options)
    module, _, name = word.runner.partition(":")
    status: int = getattr(import_module(f".{module}", __package__), name)(options)
    return status
