"""What is being drawn, for which page, and how far it is: one order at a time, whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

from diffusion_align.studio.drawing.orders import Ended, Finished, Order, Stepped, Told
from diffusion_align.studio.drawing.studio_artist import StudioArtist

from .event_stream import EventStream

#: Folder in the studio's one.
DRAWN = "drawn"


@dataclass
class _Drawing:
    """A page's last order.

    Attributes:
        heard: is told what becomes of it; what it returns is added to the job.
        job: how far it is, as the page shows it.
    """

    order: Order
    heard: Callable[[Told], Mapping[str, Any]]
    job: dict[str, Any]


@dataclass
class Easel:
    """The drawing process for all pages; an order takes the place of the one before, also of another page's.

    Attributes:
        home: the studio's folder.
        idle: seconds without an order after which the process ends.
        lock: of everything that orders and news of them change.
    """

    home: Path
    stream: EventStream
    idle: float
    lock: RLock = field(default_factory=RLock)
    artist: StudioArtist = field(init=False)
    _drawings: dict[str, _Drawing] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self.artist = StudioArtist(self.home, self.idle, self._heard)

    def number(self) -> int:
        """Of a new order."""
        with self.lock:
            self._count += 1
            return self._count

    def folder(self, number: int) -> Path:
        """A new folder for the pictures of an order."""
        return self.home / DRAWN / f"{time.strftime('%Y%m%d-%H%M%S')}-{number}"

    def draw(self, page: str, order: Order, heard: Callable[[Told], Mapping[str, Any]]) -> None:
        """Draw ``order`` for ``page``, whose tabs get events of that kind.

        Raises:
            OSError: its folder cannot be written.
        """
        try:
            Path(order.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"{order.folder} cannot be written: {error.strerror}") from None
        job = {"number": order.number, "state": "running", "done": 0, "total": len(order.rows) * len(order.columns),
               "step": 0, "steps": order.num_inference_steps, "began": time.time(), "error": ""}  # fmt: skip
        with self.lock:
            self._drawings[page] = _Drawing(order, heard, job)
            self.artist.order(order)

    def job(self, page: str) -> dict[str, Any] | None:
        """How far a page's last order is; None if there was none."""
        with self.lock:
            return dict(self._drawings[page].job) if page in self._drawings else None

    def cancel(self) -> None:
        """Draw nothing further; the process stops between two steps."""
        self.artist.cancel()

    def close(self) -> None:
        """End the drawing process."""
        self.artist.close()

    def _heard(self, told: Told) -> None:
        """From the drawing process's thread."""
        with self.lock:
            page = next((page for page, each in self._drawings.items() if each.order.number == told.order), None)
            if page is None:  # of an order that another one took the place of
                return
            drawing = self._drawings[page]
            job = drawing.job
            if isinstance(told, Stepped):
                job |= {"step": told.step, "steps": told.steps, "column": told.column, "row": told.row}
            elif isinstance(told, Finished):
                job |= {"done": job["done"] + 1, "step": 0}
            elif isinstance(told, Ended):
                state = "failed" if told.error else "cancelled" if told.cancelled else "done"
                job |= {"state": state, "error": told.error}
            job |= drawing.heard(told)
            done = job["done"] + job["step"] / max(1, job["steps"])
            spent = time.time() - job["began"]
            job["left"] = spent / done * (job["total"] - done) if done > 0.05 else None
            news = {} if isinstance(told, Stepped) else {"board": True}
            self.stream.send(page, job=dict(job), **news)
