"""Pictures to be repainted in part: a folder of them, or the embedded world's, with masks given or drawn."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from PIL import Image

from diffusion_align.pictures import SUFFIXES as PICTURES
from diffusion_align.pictures import CorruptImageError, decoded_mask, decoded_picture
from diffusion_align.shipped import SCENE_HOLES

from .masks import Mask


@dataclass(frozen=True)
class InpaintingExample:
    """A picture, what should be seen in it, and where it is to be repainted (None: a random mask)."""

    prompt: str
    picture: Image.Image
    mask: Mask | None = None


class InpaintingSource(Protocol):
    """Examples with random access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> InpaintingExample: ...


class PictureFolder:
    """A folder of pictures; ``metadata.jsonl`` or ``.csv`` may give ``file_name``, ``caption`` and ``mask`` (a picture,
    white where it is to be repainted). Without metadata all pictures are taken, with empty prompts.

    Raises:
        FileNotFoundError: no such folder, no picture in it, or a file that the metadata names is missing.
        ValueError: metadata without ``file_name``, or a line that is no JSON.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            shipped = ", ".join(SCENE_HOLES)
            raise FileNotFoundError(f"data set {str(folder)!r} not found: expected a folder of pictures, or {shipped}")
        self.rows = self._rows()
        if not self.rows:
            raise FileNotFoundError(f"{self.folder} holds no pictures ({', '.join(PICTURES)})")
        for row in self.rows:
            for name in filter(None, (row["file_name"], row.get("mask"))):
                if not (self.folder / name).is_file():
                    raise FileNotFoundError(f"{self.folder}: the metadata names {name}, which is not there")

    def _rows(self) -> list[dict[str, str]]:
        for name in ("metadata.jsonl", "metadata.csv"):
            path = self.folder / name
            if not path.is_file():
                continue
            if path.suffix == ".csv":
                with path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            else:
                rows = []
                for number, line in enumerate(path.read_text().splitlines(), start=1):
                    try:
                        rows += [json.loads(line)] if line.strip() else []
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
            for number, row in enumerate(rows, start=1):
                if not row.get("file_name"):
                    raise ValueError(f"{path}, row {number}: file_name is missing; found {', '.join(row)}")
            return rows
        return [{"file_name": p.name} for p in sorted(self.folder.iterdir()) if p.suffix.lower() in PICTURES]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> InpaintingExample:
        row = self.rows[index]
        path, mask = self.folder / row["file_name"], None
        picture = decoded_picture(path, str(path))
        if row.get("mask"):
            path = self.folder / row["mask"]
            mask = decoded_mask(path, str(path))
            if mask.shape != (picture.height, picture.width):
                raise CorruptImageError(
                    f"{path}: the mask has {mask.shape[1]} x {mask.shape[0]} pixels, its picture {row['file_name']} "
                    f"{picture.width} x {picture.height}"
                )
        return InpaintingExample(row.get("caption") or "", picture, mask)


def open_inpainting(source: str, split: str = "train") -> InpaintingSource:
    """``scenes-holes`` (random masks), ``scenes-objects`` (an object is to be repainted), or a folder of pictures (its
    subfolder ``split``, if there is one)."""
    if source in SCENE_HOLES:
        module, _, function = SCENE_HOLES[source].partition(":")
        found: InpaintingSource = getattr(import_module(module), function)(split)
        return found
    folder = Path(source) / split
    return PictureFolder(folder if folder.is_dir() else source)
