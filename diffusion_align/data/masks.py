"""Masks for inpainting: True where the picture is to be repainted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def box_mask(rng: np.random.Generator, height: int, width: int) -> Mask:
    """A rectangle with sides of 30% to 70% of the image."""
    mask = np.zeros((height, width), bool)
    tall, wide = (int(rng.integers(int(0.3 * side), int(0.7 * side) + 1)) for side in (height, width))
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    mask[top : top + tall, left : left + wide] = True
    return mask


def brush_mask(rng: np.random.Generator, height: int, width: int) -> Mask:
    """A free-hand stroke: a random walk of discs."""
    y, x = np.mgrid[:height, :width]
    size, limits = min(height, width), np.array([height - 1, width - 1])
    center = rng.uniform(0.2, 0.8, size=2) * (height, width)
    direction = rng.uniform(0, 2 * np.pi)
    mask = np.zeros((height, width), bool)
    for _ in range(int(rng.integers(6, 14))):
        radius = rng.uniform(0.06, 0.12) * size
        mask |= np.hypot(x - center[1], y - center[0]) < radius
        direction += rng.normal(0, 0.7)
        center = np.clip(center + 0.1 * size * np.array([np.cos(direction), np.sin(direction)]), 0, limits)
    return mask


def half_mask(rng: np.random.Generator, height: int, width: int) -> Mask:
    """Outpainting: one half of the image, on a random side."""
    mask = np.zeros((height, width), bool)
    side = int(rng.integers(4))
    rows, columns = (
        (slice(None, height // 2), slice(height // 2, None)),
        (slice(None, width // 2), slice(width // 2, None)),
    )
    if side < 2:
        mask[rows[side]] = True
    else:
        mask[:, columns[side - 2]] = True
    return mask


def border_mask(rng: np.random.Generator, height: int, width: int) -> Mask:
    """Outpainting all around: what lies outside a centred window of 40% to 70% of each side (PrefPaint's crops)."""
    mask = np.ones((height, width), bool)
    share = rng.uniform(0.4, 0.7)
    tall, wide = round(share * height), round(share * width)
    top, left = (height - tall) // 2, (width - wide) // 2
    mask[top : top + tall, left : left + wide] = False
    return mask


MASKS: Mapping[str, Callable[[np.random.Generator, int, int], Mask]] = MappingProxyType(
    {"box": box_mask, "brush": brush_mask, "half": half_mask, "border": border_mask}
)


def sample_mask(
    rng: np.random.Generator, height: int, width: int, kinds: Sequence[str] = ("box", "brush", "half")
) -> Mask:
    """A mask (height, width) of a random one of ``kinds`` (keys of ``MASKS``)."""
    return MASKS[str(rng.choice(list(kinds)))](rng, height, width)
