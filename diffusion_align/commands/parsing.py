"""From arguments to options. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from diffusion_align.names import hint

from .options import Options

OptionsT = TypeVar("OptionsT", bound=Options)


def parse_options(cls: type[OptionsT], name: str, arguments: list[str], bare: str | None = None) -> OptionsT:
    """Checked options of the command ``name``.

    Args:
        bare: the flag whose value may stand first, without its name.

    Raises:
        ValueError: options that do not fit each other.
        SystemExit: help was asked for (code 0), or a flag is unknown (code 2).
    """
    import tyro

    if bare is not None and arguments and not arguments[0].startswith("-"):
        arguments = [bare, *arguments]
    options = tyro.cli(cls, prog=f"diffusion-align {name}", args=arguments)
    options.check()
    return options


def asks_for_help(arguments: list[str]) -> bool:
    """Whether a command that needs a second word was given none, or asked for help."""
    return not arguments or arguments[0] in ("-h", "--help")


def unknown(kind: str, given: str, known: Iterable[str]) -> str:
    """An error text with the nearest known name."""
    names = list(known)
    return f"unknown {kind} {given!r}{hint(given, names)}: expected one of {', '.join(names)}"


def scorer_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Options of a scorer from KEY=VALUE, numbers and truth values as such; a key given more than once has a tuple."""
    import yaml

    values: dict[str, tuple[Any, ...]] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        values[key] = (*values.get(key, ()), yaml.safe_load(value))
    return {key: found if len(found) > 1 or key == "templates" else found[0] for key, found in values.items()}
