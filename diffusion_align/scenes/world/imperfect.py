"""Rendered scenes as a model might get them wrong: borderline sizes and places, bent outlines, half-right objects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .grammar import FORBIDDEN_ON, RADII, PromptSpec, Scene, SceneObject, sample_scene
from .render import IMAGE_SIZE, render

#: Radii from below the smallest object to above the largest, so that sizes between small and large occur.
_RADIUS = (0.8 * RADII["small"][0], 1.1 * RADII["large"][1])


def loose_scene(spec: PromptSpec, rng: np.random.Generator) -> Scene:
    """A scene with the objects of ``spec``, now and then one too few or too many, of any size and anywhere."""
    wanted = list(spec.objects)
    kind = rng.random()
    if kind < 0.12 and len(wanted) > 1:
        wanted.pop(int(rng.integers(len(wanted))))
    elif kind < 0.24 and len(wanted) < 4:
        wanted.append(wanted[int(rng.integers(len(wanted)))])
    objects: list[SceneObject] = []
    for each in wanted:
        for _ in range(20):
            radius = float(rng.uniform(*_RADIUS))
            x, y = (float(v) for v in rng.uniform(0.8 * radius, 1 - 0.8 * radius, size=2))
            if all(np.hypot(x - o.x, y - o.y) > 0.9 * (radius + o.radius) for o in objects):
                break
        angle = float(rng.normal(0.0, 0.1))
        objects.append(SceneObject(each.shape, each.color, each.size or "small", x, y, radius, angle))
    return Scene(tuple(objects), spec.background, float(rng.random()))


def jittered(scene: Scene, rng: np.random.Generator) -> Scene:
    """``scene`` with its objects moved and resized a little."""
    objects = [
        replace(
            o,
            x=float(np.clip(o.x + rng.normal(0, 0.05), 0.1, 0.9)),
            y=float(np.clip(o.y + rng.normal(0, 0.05), 0.1, 0.9)),
            radius=float(o.radius * rng.uniform(0.85, 1.2)),
        )
        for o in scene.objects
    ]
    return replace(scene, objects=tuple(objects))


def bent(image: NDArray[np.uint8], reach: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """``image`` (64, 64, 3) pulled about by a smooth field of ``reach`` pixels (standard deviation)."""
    coarse = rng.normal(0, reach, (2, 6, 6))
    field = np.stack([ndimage.zoom(plane, IMAGE_SIZE / 6, order=3) for plane in coarse])
    grid = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + field
    channels = [ndimage.map_coordinates(image[..., c], grid, order=1, mode="nearest") for c in range(3)]
    bent_image: NDArray[np.uint8] = np.stack(channels, axis=-1).astype(np.uint8)
    return bent_image


def merged(first: NDArray[np.uint8], second: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Two pictures of one background that flow into each other along a soft wavy line."""
    field = ndimage.zoom(rng.normal(0, 1, (4, 4)), IMAGE_SIZE / 4, order=3)
    share = np.clip(0.5 + 4 * field, 0, 1)[..., None]
    return np.rint(first * share + second * (1 - share)).astype(np.uint8)


def imperfect_picture(spec: PromptSpec, other: PromptSpec, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture uint8 (64, 64, 3) for ``spec``, or for ``other``, a near miss, or between the two."""

    def scene(of: PromptSpec) -> Scene:
        strict = rng.random() < 0.5
        return jittered(sample_scene(of, rng), rng) if strict else loose_scene(of, rng)

    drawn = scene(spec if rng.random() < 0.6 else other)
    image = render(drawn)
    if rng.random() < 0.3:
        changed = replace(
            drawn,
            objects=tuple(
                replace(o, shape=w.shape, color=w.color)
                for o, w in zip(drawn.objects, other.objects, strict=False)
                if w.color not in FORBIDDEN_ON.get(drawn.background, ())
            ),
        )
        image = merged(image, render(changed), rng)
    return blemished(image, rng)


def blemished(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """``image`` (64, 64, 3), often bent, now and then blurred or noisy."""
    if rng.random() < 0.7:
        image = bent(image, float(rng.uniform(0.3, 2.2)), rng)
    if rng.random() < 0.4:
        soft = float(rng.uniform(0.3, 0.9))
        image = np.rint(ndimage.gaussian_filter(image.astype(np.float32), (soft, soft, 0))).astype(np.uint8)
    if rng.random() < 0.3:
        image = np.clip(image + rng.normal(0, rng.uniform(1, 8), image.shape), 0, 255).astype(np.uint8)
    return image
