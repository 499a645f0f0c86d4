"""Pictures to network inputs, on tensors, so that gradients pass; the published PIL pipelines but for rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from diffusion_align.pictures import rgb_picture

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def to_pixels(images: Tensor | Sequence[Image.Image] | Sequence[Tensor], what: str) -> Tensor | list[Tensor]:
    """A checked batch (B, 3, H, W) float in [0, 1]; pictures of different sizes stay a list of (3, H, W).

    Raises:
        ValueError: empty, or a wrong type, shape, dtype or range (e.g. images in [-1, 1] or 0..255), or a PIL picture
            that cannot be decoded; starts with ``what``.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
            raise ValueError(f"{what}: expected shape (B, 3, H, W), found {tuple(images.shape)}")
        return _in_range(images, what)
    kinds = sorted({type(image).__name__ for image in images}) or ["nothing"]
    if len(images) and all(isinstance(image, Image.Image) for image in images):
        shown = [rgb_picture(image, f"{what}, picture {i}") for i, image in enumerate(images)]  # type: ignore[arg-type]
        pictures = [tv.pil_to_tensor(image).float() / 255 for image in shown]
    elif len(images) and all(isinstance(image, Tensor) and image.ndim == 3 for image in images):
        pictures = [_in_range(image, what) for image in images]  # type: ignore[arg-type]
    else:
        raise ValueError(f"{what}: expected a float tensor (B, 3, H, W) or PIL pictures, found {', '.join(kinds)}")
    return torch.stack(pictures) if len({picture.shape for picture in pictures}) == 1 else pictures


def _in_range(images: Tensor, what: str) -> Tensor:
    if not images.is_floating_point():
        raise ValueError(f"{what}: expected floats in [0, 1], found {images.dtype}; divide uint8 by 255")
    low, high = torch.stack(images.detach().aminmax()).tolist()  # one reading of the device
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also NaN
        raise ValueError(f"{what}: expected values in [0, 1], found [{low:g}, {high:g}]")
    return images


@dataclass(frozen=True)
class Preprocess:
    """Resize (bicubic) to ``size`` x ``size``, then normalise.

    Attributes:
        size: pixels of the square network input.
        fit: "crop" scales the short side and crops the centre (CLIP), "squash" ignores the aspect ratio (SigLIP),
            "pad" scales the long side and pads with black (HPSv2).
        mean, std: of the normalisation, per channel.
        antialias: whether all pixels count when pictures are made smaller, as in PIL, or only the 4 x 4 nearest.
    """

    size: int
    fit: Literal["crop", "squash", "pad"] = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    antialias: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, 3, size, size) normalised, float32."""
        images = self.resize(images.float()).clamp(0, 1)  # bicubic overshoots, PIL clips
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std

    def resize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, size, size)."""
        height, width = images.shape[-2:]
        size = self.size
        if self.fit == "squash":
            return self._bicubic(images, [size, size])
        if self.fit == "crop":
            return tv.center_crop(self._bicubic(images, [size]), [size, size])
        scale = size / max(height, width)
        new_height, new_width = round(height * scale), round(width * scale)
        images = self._bicubic(images, [new_height, new_width])
        left, top = (size - new_width) // 2, (size - new_height) // 2
        return pad(images, (left, size - new_width - left, top, size - new_height - top))

    def _bicubic(self, images: Tensor, size: list[int]) -> Tensor:
        return tv.resize(images, size, interpolation=InterpolationMode.BICUBIC, antialias=self.antialias)


def in_float32(like: Tensor) -> Any:
    """Heads stay in float32 whatever the caller's autocast: bf16 keeps three digits of a score."""
    return torch.autocast(like.device.type, enabled=False)
