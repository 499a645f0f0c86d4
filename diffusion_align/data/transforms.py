"""From decoded images to training pixels: one crop and one flip for both images of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Interpolation = Literal["lanczos", "bicubic", "bilinear"]


@dataclass(frozen=True)
class PairTransform:
    """Resize so that the image covers the target, crop, flip.

    Attributes:
        resolution: side of square targets, in pixels.
        random_crop: crop anywhere instead of in the centre.
        random_flip: mirror half of the pairs.
        buckets: target sizes (h, w) to choose from by the chosen image's aspect ratio; None is always square.
        interpolation: PIL's filter: lanczos, bicubic or bilinear, whose support grows with the reduction.
    """

    resolution: int
    random_crop: bool = False
    random_flip: bool = True
    buckets: tuple[tuple[int, int], ...] | None = None
    interpolation: Interpolation = "lanczos"

    def __call__(
        self, images: Sequence[Image.Image], seed: int, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pixels (K, 3, H, W) float32 in [-1, 1] and size ids (K, 6) float32 of the K images of one pair.

        Args:
            size: (H, W); None is the target of the first image.
        """
        down, right, flip = self.draw(seed)
        size = size or self.target(images[0].size)
        parts = [self.crop(image, size, down, right, flip) for image in images]
        return torch.stack([p for p, _ in parts]), torch.stack([ids for _, ids in parts])

    def crop(
        self, image: Image.Image, size: tuple[int, int], down: float, right: float, flip: bool
    ) -> tuple[Tensor, Tensor]:
        """:func:`crop` with this transform's filter."""
        return crop(image, size, down, right, flip, self.interpolation)

    def centred_ids(self, picture: tuple[int, int], size: tuple[int, int], flip: bool) -> list[float]:
        """Size ids of the centre crop (h, w) of a picture of PIL size (w, h), without the picture."""
        full = covering(picture, size)
        top, left = round(0.5 * (full[1] - size[0])), round(0.5 * (full[0] - size[1]))
        left = full[0] - size[1] - left if flip else left
        return [float(value) for value in (picture[1], picture[0], top, left, *size)]

    def draw(self, seed: int) -> tuple[float, float, bool]:
        """Where to crop, as fractions of the free room, and whether to flip."""
        rng = np.random.default_rng(seed % 2**64)
        down, right, flip = rng.random(3)
        if not self.random_crop:
            down = right = 0.5
        return float(down), float(right), bool(self.random_flip and flip < 0.5)

    def target(self, size: tuple[int, int]) -> tuple[int, int]:
        """Target (h, w) of an image of PIL ``size`` (w, h)."""
        if self.buckets is None:
            return self.resolution, self.resolution
        ratio = np.log(size[1] / size[0])
        return min(self.buckets, key=lambda bucket: abs(np.log(bucket[0] / bucket[1]) - ratio))

    def settings(self) -> dict[str, Any]:
        """The fields as JSON types; without ``interpolation`` where it is what it was before there was a choice."""
        values = asdict(self)
        if self.interpolation == "lanczos":
            del values["interpolation"]
        return values | {"buckets": None if self.buckets is None else [list(bucket) for bucket in self.buckets]}


def crop(
    image: Image.Image,
    size: tuple[int, int],
    down: float,
    right: float,
    flip: bool,
    interpolation: Interpolation = "lanczos",
) -> tuple[Tensor, Tensor]:
    """Pixels (3, h, w) in [-1, 1] and SDXL's size ids (6,): original h, w, crop top, left, target h, w."""
    height, width = size
    full = covering(image.size, size)
    resized = image if image.size == full else image.resize(full, Image.Resampling[interpolation.upper()])
    top, left = round(down * (full[1] - height)), round(right * (full[0] - width))
    part = resized.crop((left, top, left + width, top + height))
    if flip:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = full[0] - width - left
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.tensor([image.height, image.width, top, left, height, width], dtype=torch.float32)


def covering(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """PIL size (w, h) to which a picture of PIL size ``picture`` is resized so that it covers a target (h, w)."""
    (given_width, given_height), (height, width) = picture, size
    scale = max(height / given_height, width / given_width)
    return max(width, round(given_width * scale)), max(height, round(given_height * scale))


def make_buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Sizes (h, w), multiples of ``step``, of at most resolution^2 pixels and aspect ratio up to ``max_ratio``.

    Raises:
        ValueError: ``resolution`` is not divisible by ``step``.
    """
    if resolution % step:
        raise ValueError(f"resolution = {resolution} must be divisible by {step} for aspect-ratio buckets")
    sizes = set()
    for short in range(step, resolution + 1, step):
        long = resolution**2 // short // step * step
        if long <= max_ratio * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))
