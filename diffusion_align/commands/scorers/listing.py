"""``diffusion-align scorers``: a table of every scorer. Neither torch nor any weights are loaded for it."""

from __future__ import annotations

from typing import Any

from diffusion_align.commands.console import conclude
from diffusion_align.commands.console.text_table import aligned
from diffusion_align.commands.options import ScorersOptions
from diffusion_align.rewards.catalogue import Entry, catalogue

COLUMNS = ("name", "size", "licence", "needs", "weights")


def record(entry: Entry) -> dict[str, Any]:
    """What the list says of a scorer, as JSON has it."""
    facts = entry.facts
    return {
        "name": entry.name,
        "gigabytes": entry.gigabytes,
        "licence": None if facts is None else facts.licence,
        "needs": [] if facts is None else list(facts.needs),
        "options": [] if facts is None else list(facts.options),
        "install": None if facts is None else facts.install,
        "sources": [] if facts is None else [{"source": p.source, "files": list(p.files)} for p in facts.parts],
        "weights": entry.place,
    }


def row(entry: Entry) -> tuple[str, ...]:
    """The same as cells of ``COLUMNS``."""
    facts = entry.facts
    if facts is None:
        return entry.name, "", "", "", "plug-in"
    wanted = [*facts.needs, *facts.options]
    if entry.place == "not installed" and facts.install:
        wanted.append(facts.install)
    return entry.name, shown_size(entry.gigabytes), facts.licence, ", ".join(wanted), entry.place


def shown_size(gigabytes: float | None) -> str:
    """A size for people: "3.9 GB", "2 MB"; empty where it is not known."""
    if gigabytes is None:
        return ""
    return f"{gigabytes:.1f} GB" if gigabytes >= 0.1 else f"{1000 * gigabytes:.0f} MB"


def run(options: ScorersOptions) -> int:
    """Print the list; returns the exit status."""
    entries = catalogue()
    told = "Sizes are those of the published files. Try one: diffusion-align scorers verify NAME"
    lines = aligned([dict(zip(COLUMNS, row(entry), strict=True)) for entry in entries])
    conclude("\n".join([*lines, "", told]), [record(entry) for entry in entries])
    return 0
