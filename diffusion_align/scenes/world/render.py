"""Draw scenes: signed distances, supersampled, with soft gradients and shadows."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .grammar import Scene, SceneObject

Array = NDArray[np.floating[Any]]

IMAGE_SIZE = 64
_SUPERSAMPLE = 2

COLOR_RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.13, 0.17),
    "orange": (0.96, 0.49, 0.08),
    "yellow": (0.98, 0.87, 0.18),
    "green": (0.20, 0.66, 0.32),
    "blue": (0.16, 0.40, 0.90),
    "purple": (0.56, 0.24, 0.74),
    "white": (0.97, 0.97, 0.97),
}

#: Lightness at the top and the bottom of each background.
BACKGROUND_LIGHTNESS = {"dark": (0.16, 0.09), "grey": (0.52, 0.43), "light": (0.93, 0.84)}
TINT_SATURATION = {"dark": 0.22, "grey": 0.10, "light": 0.25}


def background_rgb(background: str, tint: float) -> tuple[Array, Array]:
    """Colours (3,) in [0, 1] at the top and bottom edge of a background with hue ``tint``."""
    top, bottom = BACKGROUND_LIGHTNESS[background]
    colors = [colorsys.hls_to_rgb(tint, lightness, TINT_SATURATION[background]) for lightness in (top, bottom)]
    return np.array(colors[0], np.float32), np.array(colors[1], np.float32)


def shape_distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance (negative inside) to a unit-size ``shape`` at the origin; y grows downwards."""
    if shape == "circle":
        return np.hypot(x, y) - 0.92
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.25
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.80
    if shape == "cross":
        bar = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.32)
        return np.minimum(bar, np.maximum(np.abs(y) - 0.95, np.abs(x) - 0.32))
    if shape == "triangle":
        return _polygon_distance(x, y, [(0.0, -1.0), (0.98, 0.78), (-0.98, 0.78)])
    if shape == "star":
        turns = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
        return _polygon_distance(x, y, list(zip(radii * np.sin(turns), -radii * np.cos(turns), strict=True)))
    raise ValueError(f"unknown shape {shape!r}")


def _polygon_distance(x: Array, y: Array, vertices: list[tuple[float, float]]) -> Array:
    """Exact distance to a polygon; the sign comes from the crossing rule, so that it may be concave."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, np.hypot(px - along * ex, py - along * ey))
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (px < ex * py / (ey if ey != 0 else 1e-9))
    return np.where(inside, -nearest, nearest).astype(np.float32)


def _grid(size: int) -> tuple[Array, Array]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    return x, y


def object_distance(obj: SceneObject, x: Array, y: Array) -> Array:
    """Signed distance to ``obj`` in units of the image side, on coordinates ``x, y`` in [0, 1]."""
    cos, sin = np.cos(obj.angle), np.sin(obj.angle)
    dx, dy = (x - obj.x) / obj.radius, (y - obj.y) / obj.radius
    distance = shape_distance(obj.shape, cos * dx + sin * dy, -sin * dx + cos * dy)
    return (distance * obj.radius).astype(np.float32)


def object_mask(obj: SceneObject, size: int = IMAGE_SIZE) -> NDArray[np.bool_]:
    """Pixels (size, size) whose centre lies in ``obj``."""
    return object_distance(obj, *_grid(size)) < 0


def render(scene: Scene, size: int = IMAGE_SIZE) -> NDArray[np.uint8]:
    """Draw ``scene`` as uint8 RGB (size, size, 3); the same scene gives the same bytes."""
    fine = size * _SUPERSAMPLE
    x, y = _grid(fine)
    top, bottom = background_rgb(scene.background, scene.tint)
    image = top + (bottom - top) * y[..., None]
    edge = 1.0 / fine
    for obj in scene.objects:
        shadow = object_distance(_shifted(obj, 0.018, 0.028), x, y)
        image *= 1.0 - 0.28 * _smooth_inside(shadow, 0.03)[..., None]
    for obj in scene.objects:
        cover = _smooth_inside(object_distance(obj, x, y), edge)[..., None]
        light = -((x - obj.x) + 1.4 * (y - obj.y)) / obj.radius
        shade = 1.0 + 0.08 * np.clip(light, -1.5, 1.5)[..., None]
        color = np.clip(np.array(COLOR_RGB[obj.color], np.float32) * shade, 0.0, 1.0)
        image = image * (1 - cover) + color * cover
    image = image.reshape(size, _SUPERSAMPLE, size, _SUPERSAMPLE, 3).mean(axis=(1, 3))
    return np.clip(np.rint(image * 255.0), 0, 255).astype(np.uint8)


def _shifted(obj: SceneObject, dx: float, dy: float) -> SceneObject:
    return SceneObject(obj.shape, obj.color, obj.size, obj.x + dx, obj.y + dy, obj.radius, obj.angle)


def _smooth_inside(distance: Array, width: float) -> Array:
    ramp = np.clip(0.5 - distance / (2 * width), 0.0, 1.0)
    return (ramp * ramp * (3 - 2 * ramp)).astype(np.float32)
