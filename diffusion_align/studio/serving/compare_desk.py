"""What the Compare page asks for: a board of pictures, rows of one noise, columns of one side each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_align.evaluation.arena.side_grammar import parse_side
from diffusion_align.evaluation.figures import image_grid
from diffusion_align.pictures import decoded_picture
from diffusion_align.studio.drawing.orders import Finished, Opened, Order, Told
from diffusion_align.studio.labels.label_store import checked_name
from diffusion_align.studio.labels.label_tasks import TASK, TaskSettings, begin_task
from diffusion_align.studio.sources.units import Picture

from .drawing_requests import read_order
from .easel import Easel
from .picture_catalogue import Catalogue, Entry

#: The page's name at the easel, and the kind of its events.
PAGE = "compare"
#: Pictures of a column.
MOST_ROWS = 64
#: Range of the slider.
STRENGTHS = (0.0, 2.0)


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
    easel: Easel
    _board: Board | None = None

    def start(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A new board.

        Raises:
            ValueError: a side or a number that is wrong. LookupError: a side outside the roots.
        """
        with self.easel.lock:
            number = self.easel.number()
            folder = self.easel.folder(number)
            order = read_order(given, self.home, self.catalogue, MOST_ROWS, number, folder / "1")
            board = Board(order, folder, [parse_side(text).name for text in order.columns.values()])
            self._send(order, board)
            self._board = board
            return self.state({})

    def strength(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """One column at another strength of its trained weights.

        Raises:
            ValueError: a strength that the slider does not have. LookupError: no such column.
        """
        with self.easel.lock:
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
                columns = {column: board.order.columns[column]}
                folder = board.folder / f"{strength:g}"
                order = replace(board.order, number=self.easel.number(), folder=str(folder), columns=columns,
                                strengths={column: strength})  # fmt: skip
                self._send(order, board)
            return self.state({})

    def cancel(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Draw nothing further."""
        self.easel.cancel()
        return self.state({})

    def state(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Everything on the page, for a tab that is new or was loaded again."""
        with self.easel.lock:
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
                "job": self.easel.job(PAGE),
            }  # fmt: skip

    def label(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a folder of labels from two columns or more, at strength 1.

        Raises:
            ValueError: a picture is not drawn yet, or the name is taken.
        """
        with self.easel.lock:
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
        with self.easel.lock:
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

    def _send(self, order: Order, board: Board) -> None:
        self.easel.draw(PAGE, order, lambda told: self._heard(told, order, board))

    def _heard(self, told: Told, order: Order, board: Board) -> dict[str, Any]:
        """Keep what is told of ``order``; nothing of it belongs to the job."""
        if isinstance(told, Opened) and not order.strengths:
            board.commands[told.column], board.trained[told.column] = told.command, told.trained
        elif isinstance(told, Finished):
            strength = order.strengths.get(told.column)
            picture = Picture(Path(told.file), name=Path(told.file).name)
            key = _key(told.column, told.row, 1.0 if strength is None else strength)
            board.cells[key] = {
                "picture": self.catalogue.add(Entry((picture,), 0, lossless=True)),
                "file": told.file,
                "facts": dict(told.facts),
            }
        return {}


def _key(column: int, row: int, strength: float) -> str:
    return f"{column}/{row}/{strength:g}"
