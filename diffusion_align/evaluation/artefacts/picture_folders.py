"""Folders of pictures, for figures of what was drawn elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_align.pictures import SUFFIXES, decoded_picture

from .artefact_alarms import DEVIATIONS, Change, Spread, changes
from .artefact_figures import measure


def compare_pictures(
    tuned: Tensor | str | Path, base: Tensor | str | Path, seeds_per_prompt: int = 1, deviations: float = DEVIATIONS
) -> tuple[Change, ...]:
    """Figures of a tuned model's pictures against its base's, from tensors (N, 3, H, W) in [0, 1] or from two folders.

    Files are matched by name, and taken in the order of their names: the K pictures of a prompt must follow each other.

    Raises:
        ValueError: pictures of different sizes, or a name that one folder lacks.
        FileNotFoundError: a folder without pictures.
        CorruptImageError: a file that is no picture.
    """
    names = [picture_names(side) for side in (tuned, base) if isinstance(side, str | Path)]
    if len(names) == 2 and names[0] != names[1]:
        alone = sorted(set(names[0]) ^ set(names[1]))[0]
        here, there = (tuned, base) if alone in names[0] else (base, tuned)
        raise ValueError(f"{alone} is in {here}, not in {there}: expected pictures of the same names in both")
    ours, theirs = (load_pictures(side) if isinstance(side, str | Path) else side for side in (tuned, base))
    figures = measure(theirs, seeds_per_prompt)
    return changes(measure(ours, seeds_per_prompt), figures, Spread.of(figures), deviations)


def picture_names(folder: str | Path) -> Sequence[str]:
    """Names of a folder's pictures, sorted.

    Raises:
        FileNotFoundError: it is no folder, or has none.
    """
    found = sorted(path.name for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{folder}: expected a folder with pictures ({', '.join(SUFFIXES)})")
    return found


def load_pictures(folder: str | Path) -> Tensor:
    """A folder's pictures in the order of their names, (N, 3, H, W) float32 in [0, 1].

    Raises:
        ValueError: their sizes differ; the first other one is named.
        FileNotFoundError, CorruptImageError: as ``compare_pictures``.
    """
    arrays = []
    for name in picture_names(folder):
        path = Path(folder) / name
        arrays.append(np.asarray(decoded_picture(path, str(path))))
        if arrays[-1].shape != arrays[0].shape:
            (height, width), (tall, wide) = arrays[-1].shape[:2], arrays[0].shape[:2]
            raise ValueError(
                f"{path} is {width} x {height} pixels, the first picture {wide} x {tall}: expected one size"
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
