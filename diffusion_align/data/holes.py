"""Batches of pictures with holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_align.adapters import Adapter

from .inpainting import InpaintingSource
from .masks import sample_mask
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
