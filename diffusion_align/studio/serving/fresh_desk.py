"""Fresh pictures for Label: drawn by the drawing process, then a folder of labels is begun with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.studio.drawing.orders import Ended, Order, Told
from diffusion_align.studio.labels.label_store import checked_name
from diffusion_align.studio.labels.label_tasks import TASK, TaskSettings, begin_task, check_units, settings_from
from diffusion_align.studio.sources.units import Picture, Unit

from .drawing_requests import read_order
from .easel import Easel
from .picture_catalogue import Catalogue

#: The page's name at the easel, and the kind of its events.
PAGE = "fresh"
#: Pictures of one side.
MOST_ROWS = 4096
#: What an order is made of, beside the settings of the task.
DRAWING = ("columns", "prompts", "seed", "count", "steps", "guidance_scale", "model")


@dataclass
class FreshDesk:
    """Sides x seeds of each prompt. Several sides are judged against each other on the same noise, one side's seeds
    against each other. Records beside the pictures hold model and guidance scale, which labels are exported with."""

    home: Path
    catalogue: Catalogue
    easel: Easel

    def start(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Draw, and begin the folder of labels ``name`` at the end.

        Raises:
            ValueError: sides, prompts or settings that do not fit each other, or the name is taken.
            LookupError: a side outside the roots.
        """
        name = checked_name(str(given.get("name") or "labels"))
        if (self.home / name / TASK).is_file():
            raise ValueError(f"{name}: this folder has labels already: give another name")
        with self.easel.lock:
            number = self.easel.number()
            folder = self.easel.folder(number)
            order = read_order(given, self.home, self.catalogue, MOST_ROWS, number, folder)
            values = {key: value for key, value in given.items() if key not in (*DRAWING, "name")}
            sources = tuple(str(folder / str(column)) for column in order.columns)
            settings = settings_from({**values, "sources": sources}, "task")
            check_wanted(order, settings)
            self.easel.draw(PAGE, order, lambda told: self._heard(told, name, settings))
        return self.state({})

    def cancel(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Draw nothing further; no labels are begun."""
        self.easel.cancel()
        return self.state({})

    def state(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """How far it is, for a tab that is new or was loaded again."""
        return {"job": self.easel.job(PAGE)}

    def _heard(self, told: Told, name: str, settings: TaskSettings) -> dict[str, Any]:
        if not isinstance(told, Ended) or told.error or told.cancelled:
            return {}
        try:
            begin_task(self.home / name, settings)
        except (ValueError, OSError) as error:
            return {"state": "failed", "error": str(error)}
        return {"name": name}


def check_wanted(order: Order, settings: TaskSettings) -> None:
    """Raise ValueError if what will be drawn cannot be judged as the settings want it."""
    if settings.order == "active":
        raise ValueError("order active needs scores, which annotate makes: take random, or the order of the prompts")
    sides = len(order.columns)
    if sides * len(order.seeds) < 2:
        raise ValueError("one picture of a prompt is nothing to compare: give another side, or more pictures of each")
    pictures = sides if sides > 1 else len(order.seeds)
    shown = tuple(Picture(Path(), name=str(number)) for number in range(pictures))
    check_units([Unit("", prompt, shown) for prompt in order.prompts], settings)
