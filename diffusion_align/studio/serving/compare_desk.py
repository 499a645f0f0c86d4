"""What the Compare page asks for: a board of pictures, rows of one noise, columns of one side each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from PIL import Image

from diffusion_align.evaluation.arena.side_grammar import SideText, parse_side
from diffusion_align.evaluation.figures import image_grid
from diffusion_align.pictures import decoded_picture
from diffusion_align.studio.drawing.orders import Finished, Opened, Order, Stepped, Told
from diffusion_align.studio.drawing.studio_artist import StudioArtist
from diffusion_align.studio.labels.label_store import checked_name
from diffusion_align.studio.labels.label_tasks import TASK, TaskSettings, begin_task
from diffusion_align.studio.sources.units import Picture

from .event_stream import EventStream
from .picture_catalogue import Catalogue, Entry

MOST_COLUMNS, MOST_ROWS = 6, 64
#: Range of the slider.
STRENGTHS = (0.0, 2.0)
#: Folder in the studio's one.
DRAWN = "drawn"


@dataclass
class Board:
    """What is on the page.

    Attributes:
        cells: by "column/row/strength" the picture's id, file and facts.
        commands: what draws a column again.
        trained: whether a column has trained weights, whose strength can be changed.
    """

    order: Order
    folder: Path
    names: list[str]
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: dict[int, str] = field(default_factory=dict)
    trained: dict[int, bool] = field(default_factory=dict)


@dataclass
class CompareDesk:
    """The board that was asked for last, and how far it is."""

    home: Path
    catalogue: Catalogue
    stream: EventStream
    idle: float
    artist: StudioArtist = field(init=False)
    _board: Board | None = None
    _current: Order | None = None
    _job: dict[str, Any] = field(default_factory=dict)
    _count: int = 0
    _lock: RLock = field(default_factory=RLock)

    def __post_init__(self) -> None:
        self.artist = StudioArtist(self.home, self.idle, self._heard)

    def start(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A new board.

        Raises:
            ValueError: a side or a number that is wrong. LookupError: a side outside the roots.
        """
        columns = _texts(given.get("columns"), "columns")
        sides = [self._side(text) for text in columns]
        prompts = _texts(given.get("prompts"), "prompts")
        seed, count = int(given.get("seed", 0)), int(given.get("count", 2))
        if not 1 <= len(sides) <= MOST_COLUMNS:
            raise ValueError(f"expected 1 to {MOST_COLUMNS} columns, found {len(sides)}")
        if not prompts or count < 1 or len(prompts) * count > MOST_ROWS:
            raise ValueError(
                f"expected 1 to {MOST_ROWS} pictures a column, found {len(prompts)} prompts x {count} seeds"
            )
        steps, scale = int(given.get("steps", 25)), float(given.get("guidance_scale", 5.0))
        if not 1 <= steps <= 1000:
            raise ValueError(f"steps {steps}: expected 1 to 1000")
        with self._lock:
            self._count += 1
            folder = self.home / DRAWN / f"{time.strftime('%Y%m%d-%H%M%S')}-{self._count}"
            order = Order(
                self._count, str(folder / "1"), dict(enumerate(columns)), {}, tuple(prompts),
                tuple(range(seed, seed + count)), tuple(_texts(given.get("scorers") or [], "scorers")), steps, scale,
                str(given.get("model") or ""),
            )  # fmt: skip
            self._board = Board(order, folder, [side.name for side in sides])
            self._send(order)
            return self.state({})

    def strength(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """One column at another strength of its trained weights.

        Raises:
            ValueError: a strength that the slider does not have. LookupError: no such column.
        """
        with self._lock:
            board = self._known()
            column, strength = int(given["column"]), round(float(given["strength"]), 2)
            if column not in board.order.columns:
                raise LookupError("no such column")
            if not STRENGTHS[0] <= strength <= STRENGTHS[1]:
                raise ValueError(f"strength {strength:g}: expected {STRENGTHS[0]:g} to {STRENGTHS[1]:g}")
            if not board.trained.get(column):
                raise ValueError(f"{board.names[column]} has no trained weights whose strength could be changed")
            rows = len(board.order.rows)
            if not all(_key(column, row, strength) in board.cells for row in range(rows)):
                self._count += 1
                columns = {column: board.order.columns[column]}
                folder = board.folder / f"{strength:g}"
                self._send(replace(board.order, number=self._count, folder=str(folder), columns=columns,
                                   strengths={column: strength}))  # fmt: skip
            return self.state({})

    def cancel(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Draw nothing further."""
        self.artist.cancel()
        return self.state({})

    def state(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Everything on the page, for a tab that is new or was loaded again."""
        with self._lock:
            board = self._board
            if board is None:
                return {"board": None, "job": None}
            order = board.order
            return {
                "board": {
                    "columns": list(order.columns.values()), "names": board.names, "prompts": list(order.prompts),
                    "seed": order.seeds[0], "count": len(order.seeds), "scorers": list(order.scorers),
                    "steps": order.num_inference_steps, "guidance_scale": order.guidance_scale, "model": order.model,
                    "rows": [{"prompt": prompt, "seed": seed} for prompt, seed in order.rows],
                    "cells": {key: {"picture": cell["picture"], **cell["facts"]} for key, cell in board.cells.items()},
                    "commands": board.commands, "trained": board.trained,
                },
                "job": self._job or None,
            }  # fmt: skip

    def label(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a folder of labels from two columns or more, at strength 1.

        Raises:
            ValueError: a picture is not drawn yet, or the name is taken.
        """
        with self._lock:
            board = self._known()
            columns = [int(column) for column in given.get("columns") or board.order.columns]
            folders = [self._column(board, column) for column in columns]
            name = checked_name(str(given.get("name") or f"labels-{board.folder.name}"))
            if (self.home / name / TASK).is_file():
                raise ValueError(f"{name}: this folder has labels already")
            kind = "pairs" if len(folders) == 2 else "best-worst"
            begin_task(self.home / name, TaskSettings(tuple(map(str, folders)), kind))  # type: ignore[arg-type]
        return {"name": name}

    def save_grid(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All pictures as one PNG below the studio's folder.

        Raises:
            ValueError: a picture is not drawn yet.
        """
        with self._lock:
            board = self._known()
            rows = [
                [np.asarray(decoded_picture(Path(self._cell(board, column, row)["file"]), "a drawn picture"))
                 for column in board.order.columns]
                for row in range(len(board.order.rows))
            ]  # fmt: skip
            labels = [f"{prompt} ({seed})" for prompt, seed in board.order.rows]
            grid: Image.Image = image_grid(rows, labels, board.names, upscale=max(1, 256 // rows[0][0].shape[0]))
            path = board.folder / "grid.png"
            grid.save(path)
        return {"file": str(path.relative_to(self.home))}

    def close(self) -> None:
        """End the drawing process."""
        self.artist.close()

    def _side(self, text: str) -> SideText:
        side = parse_side(text)
        place = self.home / side.what
        if place.exists() and not self.catalogue.holds(place):
            raise LookupError(f"{side.what} lies outside the folders that the studio was started with")
        return side

    def _known(self) -> Board:
        if self._board is None:
            raise LookupError("nothing was drawn yet")
        return self._board

    def _cell(self, board: Board, column: int, row: int) -> dict[str, Any]:
        cell = board.cells.get(_key(column, row, 1.0))
        if cell is None:
            raise ValueError(f"{board.names[column]}: a picture is not drawn yet")
        return cell

    def _column(self, board: Board, column: int) -> Path:
        """The folder of a column's pictures, which all are there."""
        files = [Path(self._cell(board, column, row)["file"]) for row in range(len(board.order.rows))]
        return files[0].parent

    def _send(self, order: Order) -> None:
        try:
            Path(order.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"{order.folder} cannot be written: {error.strerror}") from None
        self._current = order
        total = len(order.rows) * len(order.columns)
        self._job = {"number": order.number, "state": "running", "done": 0, "total": total, "step": 0,
                     "steps": order.num_inference_steps, "began": time.time(), "error": ""}  # fmt: skip
        self.artist.order(order)

    def _heard(self, told: Told) -> None:
        """From the drawing process's thread."""
        with self._lock:
            board, order = self._board, self._current
            if board is None or order is None or told.order != order.number:
                return
            if isinstance(told, Opened):
                if not order.strengths:
                    board.commands[told.column], board.trained[told.column] = told.command, told.trained
            elif isinstance(told, Stepped):
                self._job |= {"step": told.step, "steps": told.steps, "column": told.column, "row": told.row}
            elif isinstance(told, Finished):
                strength = order.strengths.get(told.column)
                picture = Picture(Path(told.file), name=Path(told.file).name)
                key = _key(told.column, told.row, 1.0 if strength is None else strength)
                board.cells[key] = {
                    "picture": self.catalogue.add(Entry((picture,), 0, lossless=True)),
                    "file": told.file,
                    "facts": dict(told.facts),
                }
                self._job |= {"done": self._job["done"] + 1, "step": 0}
            else:
                state = "failed" if told.error else "cancelled" if told.cancelled else "done"
                self._job |= {"state": state, "error": told.error}
            done = self._job["done"] + self._job["step"] / max(1, self._job["steps"])
            spent = time.time() - self._job["began"]
            self._job["left"] = spent / done * (self._job["total"] - done) if done > 0.05 else None
            news = {} if isinstance(told, Stepped) else {"board": True}
            self.stream.send("compare", job=dict(self._job), **news)


def _key(column: int, row: int, strength: float) -> str:
    return f"{column}/{row}/{strength:g}"


def _texts(given: Any, name: str) -> list[str]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name}: expected a list of texts")
    return [text.strip() for text in given if text.strip()]
