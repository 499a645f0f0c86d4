"""Batches of pictures with holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.pictures import CorruptImageError, checked_mask

from .inpainting import InpaintingSource
from .loader import Corruption
from .masks import Mask, sample_mask
from .transforms import crop


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

    def at(self, rows: Sequence[int]) -> Holes:
        """The examples ``rows``, any number of times and in any order."""
        chosen = list(rows)
        return Holes([self.prompts[row] for row in chosen], self.pictures[chosen], self.masks[chosen])

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


def cropped_mask(mask: Mask, size: tuple[int, int], where: str) -> Tensor:
    """``mask`` (H, W), scaled and cropped in the centre to ``size``, as (h, w) float32 of 0 and 1.

    Raises:
        CorruptImageError: in the crop it marks nothing or everything; starts with ``where``.
    """
    white = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
    part = (crop(white, size, 0.5, 0.5, flip=False)[0][0] > 0).numpy()
    return torch.from_numpy(checked_mask(part, f"{where}, cropped to {size[1]} x {size[0]} pixels")).float()


def load_holes(
    source: InpaintingSource,
    indices: Sequence[int],
    seeds: Sequence[int],
    size: int,
    kinds: Sequence[str],
    corruption: Corruption | None = None,
) -> Holes:
    """Examples ``indices``, scaled and cropped to ``size`` pixels; where no mask is given, one of ``kinds`` by seed.

    Args:
        corruption: counts the examples that cannot be used, which are replaced by the next one; None: raise.

    Raises:
        CorruptImageError, ValueError: a picture that cannot be decoded, or a mask that marks nothing or everything, and
            nobody counts; or there are more than ``corruption`` allows.
    """
    prompts, pictures, masks = [], [], []
    for index, seed in zip(indices, seeds, strict=True):
        prompt, picture, mask = _usable(source, index, size, corruption)
        if mask is None:
            mask = torch.from_numpy(sample_mask(np.random.default_rng(seed % 2**63), size, size, kinds)).float()
        prompts.append(prompt)
        pictures.append(picture)
        masks.append(mask[None])
    return Holes(prompts, torch.stack(pictures), torch.stack(masks))


def _usable(
    source: InpaintingSource, index: int, size: int, corruption: Corruption | None
) -> tuple[str, Tensor, Tensor | None]:
    """Prompt, picture (3, h, w) and mask (h, w) of example ``index``, or of the next that can be used."""
    for offset in range(len(source)):
        candidate = (index + offset) % len(source)
        try:
            example = source[candidate]
            mask = None
            if example.mask is not None:
                mask = cropped_mask(example.mask, (size, size), f"example {candidate} ({example.prompt!r})")
            pixels, _ = crop(example.picture, (size, size), 0.5, 0.5, flip=False)
            return example.prompt, ((pixels + 1) * 127.5).round() / 255, mask
        except CorruptImageError as error:
            if corruption is None:
                raise
            corruption.note(f"example {candidate}", error)
    raise ValueError("no picture of the data set can be used")
