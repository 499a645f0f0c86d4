"""What travels from files to the training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from diffusion_align.adapters.conditioning import Conditioning
from diffusion_align.devices import send
from diffusion_align.pictures import CorruptImageError, decoded_picture

__all__ = ["CorruptImageError", "Example", "PairBatch", "PairRecord", "collate", "decoded_picture"]


@dataclass(frozen=True)
class PairRecord:
    """One preference pair, or one picture with a caption, as stored.

    Attributes:
        chosen, rejected: encoded images (JPEG, PNG, WebP bytes); rejected is None of a single picture.
        caption: the prompt both were made for.
        preference: P(chosen is preferred): 1, or 0.5 for a tie, or a soft label in [0, 1].
        weight: factor of the pair's loss.
        key: names the pair in messages, e.g. "row 17".
    """

    chosen: bytes
    rejected: bytes | None
    caption: str
    preference: float = 1.0
    weight: float = 1.0
    key: str = ""

    def contents(self) -> dict[str, bytes]:
        """The encoded images by what messages call them, chosen first."""
        return {"chosen": self.chosen} | ({} if self.rejected is None else {"rejected": self.rejected})

    def images(self) -> tuple[Image.Image, ...]:
        """Both images, RGB, or the single one.

        Raises:
            CorruptImageError: one cannot be decoded.
        """
        return tuple(
            decoded_picture(content, f"{self.key}: the {side} image") for side, content in self.contents().items()
        )


@dataclass(frozen=True)
class PairBatch:
    """B pairs ready for a training step; chosen first wherever there is a leading 2, which is 1 of single pictures.

    Attributes:
        captions: where the caption was dropped, None for the pipeline's null prompt, or "".
        size_ids: SDXL's original h, w, crop top, left, target h, w, (2, B, 6) float32.
        preference: P(chosen is preferred), (B,) float32.
        weight: (B,) float32.
        seeds: (B,) int64; all randomness of a pair follows from its seed.
        keys: names of the pairs.
        pixels: (2, B, 3, H, W) float32 in [-1, 1], or None when cached.
        posterior: mean and standard deviation of the latents, each (2, B, C, h, w), or None.
        cond: prompt embeddings (B rows, no size ids) from a cache, or None.
    """

    captions: list[str | None]
    size_ids: Tensor
    preference: Tensor
    weight: Tensor
    seeds: Tensor
    keys: list[str]
    pixels: Tensor | None = None
    posterior: tuple[Tensor, Tensor] | None = None
    cond: Conditioning | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> PairBatch:
        """Move every tensor, without waiting for the device."""
        return replace(
            self,
            size_ids=send(self.size_ids, device),
            preference=send(self.preference, device),
            weight=send(self.weight, device),
            seeds=send(self.seeds, device),
            pixels=None if self.pixels is None else send(self.pixels, device),
            posterior=None
            if self.posterior is None
            else (send(self.posterior[0], device), send(self.posterior[1], device)),
            cond=None if self.cond is None else self.cond.map(lambda tensor: send(tensor, device)),
        )


@dataclass(frozen=True)
class Example:
    """One pair of a batch to be: the fields of :class:`PairBatch` without the batch dimension."""

    caption: str | None
    size_ids: Tensor
    preference: float
    weight: float
    key: str
    pixels: Tensor | None = None
    posterior: tuple[Tensor, Tensor] | None = None
    cond: Conditioning | None = None


def collate(examples: Sequence[Example], seeds: Sequence[int]) -> PairBatch:
    """Stack examples of one image size."""
    first = examples[0]
    posterior = None
    if first.posterior is not None:
        parts = [[e.posterior[i] for e in examples if e.posterior is not None] for i in range(2)]
        posterior = (torch.stack(parts[0], dim=1), torch.stack(parts[1], dim=1))
    return PairBatch(
        captions=[e.caption for e in examples],
        size_ids=torch.stack([e.size_ids for e in examples], dim=1),
        preference=torch.tensor([e.preference for e in examples], dtype=torch.float32),
        weight=torch.tensor([e.weight for e in examples], dtype=torch.float32),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        keys=[e.key for e in examples],
        pixels=None
        if first.pixels is None
        else torch.stack([e.pixels for e in examples if e.pixels is not None], dim=1),
        posterior=posterior,
        cond=None if first.cond is None else Conditioning.cat([e.cond for e in examples if e.cond is not None]),
    )
