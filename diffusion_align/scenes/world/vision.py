"""What the oracle sees: background, objects, and how cleanly they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .grammar import COLORS, RADII, SHAPES
from .render import BACKGROUND_LIGHTNESS, COLOR_RGB, IMAGE_SIZE, shape_distance

Array = NDArray[np.floating[Any]]

#: Components smaller than this many pixels are stray marks, not objects; the smallest ring covers about 70.
MIN_AREA = 30
#: Below this agreement with every template a component is a blob without a shape.
MIN_IOU = 0.62
_SIZE_BOUNDARY = (RADII["small"][1] + RADII["large"][0]) / 2
_TEMPLATE_SIDE = 28
_TEMPLATE_REACH = 1.15
_ANGLES = (-0.16, -0.08, 0.0, 0.08, 0.16)
_SHADOW = len(COLORS)
#: Squared distance from the background below which a colour cannot be told from it: grain would pass for white
#: objects on near-white, and pure black is the shadow's own colour (0/0).
_INDISTINCT = 8e-4


@dataclass(frozen=True)
class FoundObject:
    """An object as measured: centre and radius in units of the image side.

    Attributes:
        shape: None when it resembles no shape of the world.
        iou: agreement of its outline with the best template, [0, 1].
        softness: partly covered pixels per pixel of outline; about 1.5 in rendered images.
        area: pixels.
    """

    shape: str | None
    color: str
    size: str
    x: float
    y: float
    radius: float
    iou: float
    softness: float
    area: float


@dataclass(frozen=True)
class Detection:
    """A picture taken apart.

    Attributes:
        background: its class.
        background_rgb: fitted colours of every row, (H, 3) in [0, 1].
        objects: largest first.
        stray: pixels of foreground that belong to no object.
        roughness: RMS deviation of the bare background from its fit, in [0, 1] colour units.
    """

    background: str
    background_rgb: Array
    objects: tuple[FoundObject, ...]
    stray: float
    roughness: float


def detect(image: NDArray[np.uint8]) -> Detection:
    """Find background and objects of one picture, uint8 (64, 64, 3).

    Raises:
        ValueError: another shape or dtype.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 picture of shape ({IMAGE_SIZE}, {IMAGE_SIZE}, 3), found {image.dtype} {image.shape}"
        )
    picture = image.astype(np.float32) / 255
    rows = fit_background(picture)
    lightness = float(rows.max(axis=1).mean() + rows.min(axis=1).mean()) / 2
    middles = {name: sum(ends) / 2 for name, ends in BACKGROUND_LIGHTNESS.items()}
    background = min(middles, key=lambda name: abs(middles[name] - lightness))
    labels, cover = classify(picture, rows)
    foreground = (labels < _SHADOW) & (cover > 0.5)
    objects, kept = [], np.zeros_like(foreground)
    for mask, label in components(foreground, labels):
        kept |= mask
        objects.append(measure(mask, label, cover))
    objects.sort(key=lambda found: -found.area)
    bare = ~ndimage.binary_dilation(foreground, iterations=3) & (labels != _SHADOW)
    residual = (picture - rows[:, None])[bare]
    roughness = float(np.sqrt(np.square(residual).mean())) if len(residual) else 1.0
    return Detection(background, rows, tuple(objects), float((foreground & ~kept).sum()), roughness)


def fit_background(picture: Array) -> Array:
    """Colour of every row, (H, 3): a straight line in y through the border pixels, outliers dropped twice."""
    side = len(picture)
    y = (np.arange(side, dtype=np.float32) + 0.5) / side
    edge = np.zeros((side, side), bool)
    edge[:2] = edge[-2:] = edge[:, :2] = edge[:, -2:] = True
    colors, heights = picture[edge], np.broadcast_to(y[:, None], (side, side))[edge]
    keep = np.ones(len(colors), bool)
    for _ in range(3):
        design = np.stack([np.ones(keep.sum(), np.float32), heights[keep]], axis=1)
        line, *_ = np.linalg.lstsq(design, colors[keep], rcond=None)
        error = np.abs(colors - (line[0] + heights[:, None] * line[1])).max(axis=1)
        keep = error <= max(0.03, 2 * float(np.median(error)))
    return np.clip(line[0] + y[:, None] * line[1], 0, 1).astype(np.float32)


def classify(picture: Array, rows: Array) -> tuple[NDArray[np.intp], Array]:
    """Colour class (H, W; the last is shadow) and coverage (H, W) of every pixel.

    A pixel is background + cover * (colour - background): anti-aliased edges keep their object's class.
    """
    palette = np.array([COLOR_RGB[name] for name in COLORS] + [(0.0, 0.0, 0.0)], np.float32)
    direction = palette[None] - rows[:, None]  # (H, K, 3)
    difference = picture - rows[:, None]  # (H, W, 3)
    length = np.square(direction).sum(axis=2)[:, None]  # (H, 1, K)
    dot = difference @ direction.transpose(0, 2, 1)
    cover = np.clip(dot / np.maximum(length, _INDISTINCT), 0, 1.15)
    cover[..., _SHADOW] = np.minimum(cover[..., _SHADOW], 0.32)
    square = np.square(difference).sum(axis=2)[..., None]
    error = square - 2 * cover * dot + np.square(cover) * length
    error[..., _SHADOW] += 1e-4  # of two equal explanations, an object is the likelier one
    labels = error.argmin(axis=2)
    return labels, np.take_along_axis(cover, labels[..., None], axis=2)[..., 0].astype(np.float32)


def components(foreground: NDArray[np.bool_], labels: NDArray[np.intp]) -> list[tuple[NDArray[np.bool_], int]]:
    """Connected parts of the foreground with their colour class; touching objects of two colours are parted."""
    parts, count = ndimage.label(foreground)
    found = []
    for index in range(1, count + 1):
        mask = parts == index
        if mask.sum() < MIN_AREA:
            continue
        shares = np.bincount(labels[mask], minlength=len(COLORS) + 1)
        large = [int(label) for label in np.flatnonzero(shares > max(MIN_AREA, 0.25 * mask.sum()))]
        if len(large) < 2:
            found.append((mask, int(shares.argmax())))
            continue
        for label in large:
            pieces, number = ndimage.label(mask & (labels == label))
            for piece in range(1, number + 1):
                if (pieces == piece).sum() >= MIN_AREA:
                    found.append((pieces == piece, label))
    return found


def measure(mask: NDArray[np.bool_], label: int, cover: Array) -> FoundObject:
    """Shape, size and place of one component."""
    near = ndimage.binary_dilation(mask)
    soft = np.where(near, np.clip(cover, 0, 1), 0)
    area = float(soft.sum())
    y, x = np.nonzero(near)
    weight = soft[y, x]
    cx, cy = float((x * weight).sum() / area), float((y * weight).sum() / area)
    axis = np.linspace(-_TEMPLATE_REACH, _TEMPLATE_REACH, _TEMPLATE_SIDE, dtype=np.float32) * np.sqrt(area)
    at_y, at_x = np.meshgrid(cy + axis, cx + axis, indexing="ij")
    patch = ndimage.map_coordinates(soft, [at_y, at_x], order=1, mode="constant").ravel()
    names, templates, unit_areas, offsets = shape_templates()
    dots = templates @ patch
    overlap = dots / (np.square(templates).sum(axis=1) + patch @ patch - dots)
    best = int(overlap.argmax())
    radius = float(np.sqrt(area / unit_areas[best])) / IMAGE_SIZE
    dx, dy = offsets[best] * radius
    partial = float(((soft > 0.15) & (soft < 0.85)).sum())
    outline = float((mask & ~ndimage.binary_erosion(mask)).sum())
    return FoundObject(
        shape=names[best] if overlap[best] >= MIN_IOU else None,
        color=COLORS[label],
        size="small" if radius < _SIZE_BOUNDARY else "large",
        x=(cx + 0.5) / IMAGE_SIZE - float(dx),
        y=(cy + 0.5) / IMAGE_SIZE - float(dy),
        radius=radius,
        iou=float(overlap[best]),
        softness=partial / max(outline, 1.0),
        area=area,
    )


@cache
def shape_templates() -> tuple[list[str], Array, Array, Array]:
    """Names, templates (T, side^2), areas (T,) and centroid offsets (T, 2) of every shape at every small angle.

    Templates are centred on their centroid and scaled to unit area, so that a component needs neither centre nor
    radius to be compared; areas and offsets are those of the shape with radius 1.
    """
    names, templates, areas, offsets = [], [], [], []
    fine = np.linspace(-1.2, 1.2, 241, dtype=np.float32)
    grid_x, grid_y = np.meshgrid(fine, fine)
    for shape in SHAPES:
        for angle in _ANGLES:
            cos, sin = np.cos(angle), np.sin(angle)
            inside = shape_distance(shape, cos * grid_x + sin * grid_y, -sin * grid_x + cos * grid_y) < 0
            area = float(inside.sum()) * (fine[1] - fine[0]) ** 2
            center = np.array([grid_x[inside].mean(), grid_y[inside].mean()], np.float32)
            axis = np.linspace(-_TEMPLATE_REACH, _TEMPLATE_REACH, _TEMPLATE_SIDE, dtype=np.float32) * np.sqrt(area)
            x, y = np.meshgrid(center[0] + axis, center[1] + axis)
            distance = shape_distance(shape, cos * x + sin * y, -sin * x + cos * y)
            templates.append(np.clip(0.5 - distance / 0.12, 0, 1).ravel())
            names.append(shape)
            areas.append(area)
            offsets.append(center)
    return names, np.stack(templates).astype(np.float32), np.array(areas, np.float32), np.stack(offsets)
