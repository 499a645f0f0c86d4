"""Pictures to be repainted in part: a folder of them, or the embedded world's, with masks given or drawn."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffusion_align.adapters import Adapter

from .masks import Mask, sample_mask
from .transforms import crop

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
#: Data sets of the embedded world, and whether the hole is one of the scene's objects.
SCENE_HOLES = {"scenes-holes": False, "scenes-objects": True}
#: Pictures in each.
SCENES = 20_000


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
        mask = None
        try:
            picture = Image.open(self.folder / row["file_name"]).convert("RGB")
            if row.get("mask"):
                mask = np.array(Image.open(self.folder / row["mask"]).convert("L")) > 127
        except (UnidentifiedImageError, OSError) as error:
            raise OSError(f"{self.folder / row['file_name']}: cannot be read as a picture ({error})") from None
        return InpaintingExample(row.get("caption") or "", picture, mask)


def open_inpainting(source: str, split: str = "train") -> InpaintingSource:
    """``scenes-holes`` (random masks), ``scenes-objects`` (an object is to be repainted), or a folder of pictures (its
    subfolder ``split``, if there is one)."""
    if source in SCENE_HOLES:
        from diffusion_align.scenes.holes import SceneHoles

        return SceneHoles(SCENES, seed=0 if split == "train" else 1, objects=SCENE_HOLES[source])
    folder = Path(source) / split
    return PictureFolder(folder if folder.is_dir() else source)


@dataclass(frozen=True)
class Holes:
    """A batch of pictures with holes.

    Attributes:
        prompts: B.
        pictures: (B, 3, H, W) float32 in [0, 1].
        masks: (B, 1, H, W) float32, 1 where the picture is to be repainted.
    """

    prompts: list[str]
    pictures: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> Holes:
        return Holes(self.prompts[rows], self.pictures[rows], self.masks[rows])

    def repeat_each(self, times: int) -> Holes:
        """Every example ``times`` times, copies next to each other."""
        prompts = [prompt for prompt in self.prompts for _ in range(times)]
        return Holes(prompts, self.pictures.repeat_interleave(times, 0), self.masks.repeat_interleave(times, 0))

    @torch.no_grad()
    def encode(self, adapter: Adapter, batch_size: int = 32) -> Tensor:
        """What an inpainting network sees of the task beside its latents, (B, channels, h, w) float32 on its device."""
        parts = zip(self.pictures.split(batch_size), self.masks.split(batch_size), strict=True)
        device = adapter.device
        encoded = [adapter.encode_inpaint(p.to(device) * 2 - 1, m.to(device)).float() for p, m in parts]
        return torch.cat(encoded)

    def composite(self, images: Tensor) -> Tensor:
        """``images`` (B, 3, H, W) inside the holes, the original pictures, to the bit, outside."""
        return torch.where(self.masks > 0.5, images, self.pictures)


def load_holes(
    source: InpaintingSource, indices: Sequence[int], seeds: Sequence[int], size: int, kinds: Sequence[str]
) -> Holes:
    """Examples ``indices``, scaled and cropped to ``size`` pixels; where no mask is given, one of ``kinds`` by seed."""
    prompts, pictures, masks = [], [], []
    for index, seed in zip(indices, seeds, strict=True):
        example = source[index]
        pixels, _ = crop(example.picture, (size, size), 0.5, 0.5, flip=False)
        if example.mask is None:
            mask = torch.from_numpy(sample_mask(np.random.default_rng(seed % 2**63), size, size, kinds)).float()
        else:
            white = Image.fromarray(example.mask.astype(np.uint8) * 255).convert("RGB")
            mask = (crop(white, (size, size), 0.5, 0.5, flip=False)[0][0] > 0).float()
        prompts.append(example.prompt)
        pictures.append(((pixels + 1) * 127.5).round() / 255)
        masks.append(mask[None])
    return Holes(prompts, torch.stack(pictures), torch.stack(masks))
