"""A folder of labels and what it is about: fixed when it is begun, for every annotator and every start."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from diffusion_align.files import begin_folder, read_object
from diffusion_align.studio.sources.keyed import held_out, normalised
from diffusion_align.studio.sources.matched_folders import Match, match_folders
from diffusion_align.studio.sources.pair_tables import groups_of_table, pairs_of_table, parquet_files, read_table
from diffusion_align.studio.sources.units import Gathered, Unit

from .label_order import Order, ordered

#: In a folder of labels: what it is about.
TASK = "task.json"
#: pairs: two at a time; best-worst: all of a prompt, the best and the worst; swiss: a tournament of them.
Kind = Literal["pairs", "best-worst", "swiss"]
#: Fewest prompts of which some are held out.
FEWEST_PROMPTS = 50
#: Most pictures that are shown at once: keys 1 to 9.
MOST_AT_ONCE = 9


@dataclass(frozen=True)
class TaskSettings:
    """What is asked of whom."""

    sources: tuple[str, ...] = ()
    """A folder or file of pairs, or folders of pictures."""
    kind: Kind = "pairs"
    match: Match = "auto"
    order: Order = "random"
    seed: int = field(default_factory=lambda: secrets.randbelow(2**31))
    holdout: float = 0.0
    """Share of the prompts whose pairs are exported as the test split."""
    repeats: float = 0.05
    """Share of the pairs that come back with exchanged sides."""
    overlap: float = 0.1
    """Share of the units that every annotator gets."""
    aspects: tuple[str, ...] = ()
    """Further questions: which picture is better in this?"""
    words: bool = False
    """Whether words that a picture does not show can be marked."""

    def check(self) -> None:
        """Raise ValueError if the settings do not fit."""
        for name in ("holdout", "repeats", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected a share, 0 to 1")
        if not self.sources:
            raise ValueError("sources: expected a table of pairs, or folders of pictures")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r}: expected one of {', '.join(get_args(Kind))}")
        if self.kind != "pairs" and (self.aspects or self.words):
            raise ValueError("aspects and words go with kind pairs")
        for aspect in self.aspects:
            if not aspect.isidentifier():
                raise ValueError(f"aspect {aspect!r}: expected a name of letters, digits and '_'")


def settings_from(values: Mapping[str, Any], where: str) -> TaskSettings:
    """Checked settings from JSON.

    Raises:
        ValueError: an unknown name, or a wrong value; starts with ``where``.
    """
    known = {entry.name for entry in dataclasses.fields(TaskSettings)}
    for name in values:
        if name not in known:
            raise ValueError(f"{where}: unknown setting {name!r}: expected one of {', '.join(sorted(known))}")
    try:
        settings = TypeAdapter(TaskSettings).validate_python(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    try:
        settings.check()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return settings


@dataclass(frozen=True)
class Task:
    """An opened folder of labels.

    Attributes:
        units: in the order of the source.
        rule: how pictures were put together, in words.
    """

    folder: Path
    settings: TaskSettings
    units: tuple[Unit, ...]
    rule: str
    places: Mapping[str, int]

    def order(self, annotator: str) -> list[tuple[int, float | None]]:
        """Places of the units as ``annotator`` meets them, with p_selected."""
        keys = [unit.key for unit in self.units]
        gaps: dict[str, list[float]] = {}
        if self.settings.order == "active":
            names = sorted({name for unit in self.units for name in unit.scores})
            gaps = {name: [_spread(unit.scores.get(name, ())) for unit in self.units] for name in names}
        return ordered(keys, self.settings.order, self.settings.seed, annotator, gaps)

    def unit(self, key: str) -> Unit | None:
        """The unit of a label; None if the source has it no longer."""
        place = self.places.get(key)
        return None if place is None else self.units[place]

    def in_test(self, prompt: str) -> bool:
        """Whether a prompt is held out."""
        return held_out(prompt, self.settings.holdout, self.settings.seed)


def _spread(scores: Sequence[float]) -> float:
    """First minus second, of more than two best minus worst."""
    if len(scores) == 2:
        return scores[0] - scores[1]
    return max(scores) - min(scores) if scores else float("nan")


def begin_task(folder: Path, settings: TaskSettings) -> Task:
    """Begin a folder of labels, or open the one that was begun with the same settings.

    Raises:
        ValueError: it was begun with others, or the sources do not fit them; ``FileNotFoundError``: they are not there.
        OSError: it cannot be written.
    """
    settings.check()
    gathered = gather(settings)
    check_units(gathered.units, settings)
    begin_folder(
        folder / TASK, asdict(settings) | {"sources": list(settings.sources), "aspects": list(settings.aspects)}
    )
    return _task(folder, settings, gathered)


def open_task(folder: Path) -> Task:
    """The folder of labels that was begun before.

    Raises:
        FileNotFoundError: it is none, or its sources are gone.
        ValueError: its task is damaged.
    """
    record = read_object(folder / TASK)
    settings = settings_from(record.get("task", {}), str(folder / TASK))
    return _task(folder, settings, gather(settings))


def _task(folder: Path, settings: TaskSettings, gathered: Gathered) -> Task:
    places = {unit.key: place for place, unit in enumerate(gathered.units)}
    return Task(folder, settings, gathered.units, gathered.rule, places)


def gather(settings: TaskSettings) -> Gathered:
    """The units of the sources.

    Raises:
        FileNotFoundError, ValueError: a source is missing or does not fit; it is named.
    """
    places = [Path(source) for source in settings.sources]
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"{place}: no such file or folder")
    files = [file for place in places for file in parquet_files(place) if file.suffix == ".parquet"]
    if files:
        table = read_table(files)
        units = pairs_of_table(table) if settings.kind == "pairs" else groups_of_table(table)
        return Gathered(tuple(units), f"{len(units)} {'pairs' if settings.kind == 'pairs' else 'prompts'} of a table")
    return match_folders(places, settings.match)


def check_units(units: Sequence[Unit], settings: TaskSettings) -> None:
    """Raise ValueError if units cannot be judged in the way that is asked for."""
    for problem in _problems(units, settings):
        raise ValueError(problem)


def _problems(units: Sequence[Unit], settings: TaskSettings) -> Iterator[str]:
    if not units:
        yield f"{', '.join(settings.sources)}: no pair to judge"
    sizes = {len(unit.pictures) for unit in units}
    if settings.kind == "pairs" and sizes - {2}:
        yield f"kind pairs: expected two pictures of a prompt, found {max(sizes)}: take best-worst or swiss"
    if settings.kind == "best-worst" and max(sizes, default=0) > MOST_AT_ONCE:
        yield f"kind best-worst: {max(sizes)} pictures of a prompt, expected at most {MOST_AT_ONCE}: take swiss"
    if settings.kind != "pairs" and min(sizes, default=3) < 3:
        unit = min(units, key=lambda unit: len(unit.pictures))
        yield f"kind {settings.kind}: prompt {unit.prompt!r} has {len(unit.pictures)} pictures, expected 3 or more"
    prompts = {normalised(unit.prompt) for unit in units}
    if settings.holdout and len(prompts) < FEWEST_PROMPTS:
        found = f"the source has {len(prompts)} prompts"
        yield f"--holdout {settings.holdout:g}: {found}, expected at least {FEWEST_PROMPTS}"
