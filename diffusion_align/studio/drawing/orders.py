"""What the server and the drawing process say to each other. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Order:
    """Pictures that are wanted.

    Attributes:
        number: of the order; a later one is larger.
        folder: the pictures of column i go to a folder named i in it.
        columns: sides as [NAME=]WHAT[@key=value,...], by number of column.
        strengths: alignment strength of each column; None is the column's own.
        prompts: rows are prompts times seeds.
        scorers: names of scorers of every picture.
    """

    number: int
    folder: str
    columns: Mapping[int, str]
    strengths: Mapping[int, float | None]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    scorers: tuple[str, ...] = ()
    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    model: str = ""

    @property
    def rows(self) -> list[tuple[str, int]]:
        """Prompt and seed of every row."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


@dataclass(frozen=True)
class Opened:
    """A column is known: its command."""

    order: int
    column: int
    command: str
    trained: bool


@dataclass(frozen=True)
class Stepped:
    """A picture is so many steps of ``steps`` on its way."""

    order: int
    column: int
    row: int
    step: int
    steps: int


@dataclass(frozen=True)
class Finished:
    """A picture is there.

    Attributes:
        facts: scores, calls, scales by step and the candidates they were chosen from.
    """

    order: int
    column: int
    row: int
    file: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """An order is over: done, cancelled, or it failed and says why."""

    order: int
    cancelled: bool = False
    error: str = ""


Told = Opened | Stepped | Finished | Ended
