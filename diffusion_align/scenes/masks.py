"""Masks for inpainting: True where the picture is to be repainted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .grammar import Scene
from .render import IMAGE_SIZE, object_mask

Mask = NDArray[np.bool_]

MASK_KINDS = ("box", "brush", "half")


def box_mask(rng: np.random.Generator, size: int = IMAGE_SIZE) -> Mask:
    """A rectangle with sides of 30% to 70% of the image."""
    mask = np.zeros((size, size), bool)
    height, width = (int(v) for v in rng.integers(int(0.3 * size), int(0.7 * size) + 1, size=2))
    top, left = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
    mask[top : top + height, left : left + width] = True
    return mask


def brush_mask(rng: np.random.Generator, size: int = IMAGE_SIZE) -> Mask:
    """A free-hand stroke: a random walk of discs."""
    y, x = np.mgrid[:size, :size]
    center = rng.uniform(0.2, 0.8, size=2) * size
    direction = rng.uniform(0, 2 * np.pi)
    mask = np.zeros((size, size), bool)
    for _ in range(int(rng.integers(6, 14))):
        radius = rng.uniform(0.06, 0.12) * size
        mask |= np.hypot(x - center[0], y - center[1]) < radius
        direction += rng.normal(0, 0.7)
        center = np.clip(center + 0.1 * size * np.array([np.cos(direction), np.sin(direction)]), 0, size - 1)
    return mask


def half_mask(rng: np.random.Generator, size: int = IMAGE_SIZE) -> Mask:
    """Outpainting: one half of the image, on a random side."""
    mask = np.zeros((size, size), bool)
    mask[: size // 2] = True
    return np.rot90(mask, int(rng.integers(4))).copy()


def scene_object_mask(scene: Scene, index: int, grow: float = 1.3, size: int = IMAGE_SIZE) -> Mask:
    """Object ``index`` of a scene and a margin around it (``grow`` times its radius)."""
    obj = scene.objects[index]
    bigger = type(obj)(obj.shape, obj.color, obj.size, obj.x, obj.y, obj.radius * grow, obj.angle)
    return object_mask(bigger, size)


def sample_mask(rng: np.random.Generator, size: int = IMAGE_SIZE) -> Mask:
    """A mask of a random kind of ``MASK_KINDS``."""
    kinds = {"box": box_mask, "brush": brush_mask, "half": half_mask}
    return kinds[str(rng.choice(MASK_KINDS))](rng, size)
