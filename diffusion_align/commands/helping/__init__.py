"""``diffusion-align doctor``, ``init``, ``completion`` and ``recipes``: help to begin."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from diffusion_align.commands.options import Options
from diffusion_align.commands.parsing import asks_for_help, parse_options, unknown

from .helping_options import (
    CompletionOptions,
    CopyRecipeOptions,
    DoctorOptions,
    InitOptions,
    ListRecipesOptions,
    ShowRecipeOptions,
)

#: Who does what options say, "module:function" of this package.
RUNNERS: Mapping[type[Options], str] = MappingProxyType({
    DoctorOptions: "doctor:run", InitOptions: "new_recipe:run", CompletionOptions: "shell_scripts:run",
    ListRecipesOptions: "recipe_shelf:list_recipes", ShowRecipeOptions: "recipe_shelf:show",
    CopyRecipeOptions: "recipe_shelf:copy",
})  # fmt: skip
#: What may follow ``recipes``: its options, and what the help says.
RECIPE_WORDS: Mapping[str, tuple[type[Options], str]] = MappingProxyType(
    {
        "list": (ListRecipesOptions, "names, methods and models of all"),
        "show": (ShowRecipeOptions, "print one"),
        "copy": (CopyRecipeOptions, "copy one, to change it"),
    }
)


def parse_recipes(arguments: list[str]) -> Options:
    """Options of the word that follows ``recipes``.

    Raises:
        ValueError: another word, or an option that is wrong.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    if asks_for_help(arguments):
        lines = [f"  {word:<6}{text}" for word, (_, text) in RECIPE_WORDS.items()]
        print("\n".join([f"usage: diffusion-align recipes {'|'.join(RECIPE_WORDS)}", "", *lines]))
        raise SystemExit(0)
    word, *rest = arguments
    if word not in RECIPE_WORDS:
        raise ValueError(unknown("recipes command", word, RECIPE_WORDS))
    bare = None if word == "list" else "--name"
    return parse_options(RECIPE_WORDS[word][0], f"recipes {word}", rest, bare)


def run(options: Options) -> int:
    """Do what the options say; returns the exit status."""
    module, _, name = RUNNERS[type(options)].partition(":")
    status: int = getattr(import_module(f".{module}", __package__), name)(options)
    return status
