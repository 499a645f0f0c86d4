"""Small pictures and tables to judge."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion_align.pictures import decoded_picture


def picture(content: bytes) -> Image.Image:
    return decoded_picture(content, "a test's picture")


def encoded(level: int, number: int, size: int = 16, kind: str = "JPEG") -> bytes:
    """A picture of one brightness; ``number`` makes it a file of its own."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (size, size), (level, level, level))
    for bit in range(16):
        if number >> bit & 1:
            image.paste((level + 40,) * 3, (bit % 4 * 4, bit // 4 * 4, bit % 4 * 4 + 4, bit // 4 * 4 + 4))
    image.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()


def scored_table(folder: Path, count: int, size: int = 16) -> Path:
    """Pairs in Pick-a-Pic's columns with models and two scorers, as of ``annotate``; uids sort by brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        levels = (60, 190) if number % 2 else (190, 60)
        rows.append(
            {
                "caption": f"a small red star number {number} on a dark background",
                "jpg_0": encoded(levels[0], 2 * number, size),
                "jpg_1": encoded(levels[1], 2 * number + 1, size),
                "image_0_uid": f"{levels[0]:03d}-{number}",
                "image_1_uid": f"{levels[1]:03d}-{number}",
                "label_0": 0.5,
                "label_1": 0.5,
                "ranking_id": str(number),
                "model_0": "secret-model-one",
                "model_1": "secret-model-two",
                "score_0_pickscore": 0.5 + number / 100,
                "score_1_pickscore": 0.25,
                "score_0_aesthetic": float(number % 7),
                "score_1_aesthetic": 3.0,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet", row_group_size=500)
    return folder


def picture_folders(root: Path, names: tuple[str, ...], count: int) -> list[Path]:
    """Folders of equally named pictures with their prompts beside them; later folders are brighter."""
    folders = []
    for place, name in enumerate(names):
        folder = root / name
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.png").write_bytes(encoded(40 + 50 * place, 10 * number + place, kind="PNG"))
            (folder / f"{number}.txt").write_text(f"picture number {number}\n")
        folders.append(folder)
    return folders
