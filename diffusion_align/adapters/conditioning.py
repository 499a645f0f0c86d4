"""What a denoiser is conditioned on besides the noisy latents and the timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Conditioning:
    """Everything a denoiser is conditioned on besides the noisy latents and the timestep.

    Attributes:
        embeds: prompt embeddings, (B, L, D).
        pooled: pooled prompt embeddings of SDXL, SD3 and FLUX, (B, P), or None.
        time_ids: SDXL's size ids (original h, w, crop top, left, target h, w), (B, 6) float32, or None.
        inpaint: mask (1 = repaint) and masked-image latents for inpainting models, (B, 1 + C, h, w), or None.
        guidance: the guidance scale, (B,) float32, for models that take it as an input, or None.
        mask: which of the L places are text, (B, L) bool, for models that are told; None: all are attended to.
        base_embeds, base_pooled: what the reference's text encoders make of the prompts, where a LoRA changes them.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    inpaint: Tensor | None = None
    guidance: Tensor | None = None
    base_embeds: Tensor | None = None
    base_pooled: Tensor | None = None
    mask: Tensor | None = None

    def __repr__(self) -> str:
        parts = ((f.name, getattr(self, f.name)) for f in fields(self))
        held = [f"{name} {tuple(tensor.shape)}" for name, tensor in parts if tensor is not None]
        return f"Conditioning({', '.join(held)})"

    def of_reference(self) -> Conditioning:
        """What the reference is conditioned on."""
        if self.base_embeds is None:
            return self
        return replace(self, embeds=self.base_embeds, pooled=self.base_pooled, base_embeds=None, base_pooled=None)

    def __len__(self) -> int:
        return len(self.embeds)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply ``function`` to every tensor that is present."""
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: function(tensor) for name, tensor in present.items()})

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Conditioning:
        return self.map(lambda tensor: tensor[rows])

    def repeat(self, times: int) -> Conditioning:
        """The whole batch ``times`` times over: rows 0..B-1, 0..B-1, ..."""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move; ``dtype`` leaves the mask, and size ids and guidance in float32, whose values half precision cannot
        hold."""
        moved = self.map(lambda tensor: tensor.to(device=device, dtype=dtype))
        exact = (self.time_ids, self.guidance, self.mask)
        time_ids, guidance, mask = (None if t is None else t.to(device=device) for t in exact)
        return replace(moved, time_ids=time_ids, guidance=guidance, mask=mask)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the batch; every part must have the same fields."""
        joined: dict[str, Any] = {}
        for field in fields(Conditioning):
            values = [getattr(part, field.name) for part in parts]
            present = [v for v in values if v is not None]
            if present and len(present) != len(values):
                raise ValueError(
                    f"cannot join conditionings: {field.name!r} is set in some parts and missing in others"
                )
            joined[field.name] = torch.cat(present) if present else None
        return Conditioning(**joined)
