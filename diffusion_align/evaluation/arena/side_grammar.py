"""How a side of a comparison is written: ``[NAME=]WHAT[@key=value,...]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_NAME = re.compile(r"(?P<name>[\w.+-]+)=(?P<rest>.+)")


@dataclass(frozen=True)
class SideText:
    """One side, as it was written.

    Attributes:
        name: in tables and folders.
        what: ``base``, a run folder, a LoRA file, a hub name, or a folder of pictures.
        settings: what differs from the settings that all sides share, by name, as text.
    """

    name: str
    what: str
    settings: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        given = ",".join(f"{key}={value}" for key, value in self.settings)
        return f"{self.what}@{given}" if given else self.what


def parse_side(text: str) -> SideText:
    """Read one side. What is there as a file or folder is taken whole, whatever signs its name has.

    Without a name a side is called as the last part of what it is, with its settings.

    Raises:
        ValueError: nothing is named, or a setting is not ``key=value``.
    """
    whole = Path(text).exists()
    found = None if whole else _NAME.fullmatch(text)
    # A "name" that ends in the settings is none: base@guidance_scale=7 has an equals sign, too, but behind the @.
    name, rest = (found["name"], found["rest"]) if found else ("", text)
    what, at, given = (rest, "", "") if whole or Path(rest).exists() else rest.partition("@")
    if not what or (at and not given):
        raise ValueError(f"side {text!r}: expected [NAME=]WHAT[@key=value,...]")
    settings = []
    for entry in given.split(",") if given else ():
        key, sign, value = entry.partition("=")
        if not key or not sign or not value:
            raise ValueError(f"side {text!r}: {entry!r} is no setting: expected key=value")
        settings.append((key.replace("-", "_"), value))
    side = SideText(name, what, tuple(settings))
    return side if name else replace(side, name=_called(side))


def parse_sides(texts: Sequence[str]) -> tuple[SideText, ...]:
    """Read all sides; of those that are called alike the later ones get a number, so that A can stand beside A.

    Raises:
        ValueError: as ``parse_side``; fewer than two sides; or one name that was given to two.
    """
    if len(texts) < 2:
        raise ValueError(f"expected at least two sides to compare, e.g. base runs/dpo; got {' '.join(texts) or 'none'}")
    sides: list[SideText] = []
    for text in texts:
        side, known = parse_side(text), {other.name for other in sides}
        if side.name in known and text.startswith(f"{side.name}=") and not Path(text).exists():
            raise ValueError(f"side {text!r}: there is another side called {side.name!r}")
        number, name = 2, side.name
        while name in known:
            name, number = f"{side.name} ({number})", number + 1
        sides.append(replace(side, name=name))
    return tuple(sides)


def _called(side: SideText) -> str:
    last = Path(side.what).name or side.what
    return str(replace(side, what=last))
