"""What travels between models and methods: conditioning in, predictions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class Conditioning:
    """Everything a denoiser is conditioned on besides the noisy latents and the timestep.

    Attributes:
        embeds: prompt embeddings, (B, L, D).
        pooled: SDXL's pooled prompt embeddings, (B, P), or None.
        time_ids: SDXL's size ids (original h, w, crop top, left, target h, w), (B, 6) float32, or None.
        inpaint: mask (1 = repaint) and masked-image latents for inpainting models, (B, 1 + C, h, w), or None.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    inpaint: Tensor | None = None

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
        """Move; ``dtype`` leaves the size ids in float32, whose values half precision cannot hold."""
        moved = self.map(lambda tensor: tensor.to(device=device, dtype=dtype))
        return replace(moved, time_ids=None if self.time_ids is None else self.time_ids.to(device=device))

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


@dataclass(frozen=True)
class Prediction:
    """A denoiser's output seen as noise, clean latents or velocity, whichever it was trained to give.

    With x_t = alpha x0 + sigma eps and v = alpha eps - sigma x0 (Salimans & Ho, 2202.00512), alpha^2 + sigma^2 = 1.

    Attributes:
        output: raw network output, (B, C, h, w), float32.
        x_t: the noisy latents it was given, (B, C, h, w), float32.
        alpha, sigma: sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), (B, 1, 1, 1), float32.
        kind: what ``output`` is.
    """

    output: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    kind: PredictionType

    @property
    def eps(self) -> Tensor:
        """The noise, (B, C, h, w)."""
        if self.kind == "epsilon":
            return self.output
        if self.kind == "v_prediction":
            return self.alpha * self.output + self.sigma * self.x_t
        return (self.x_t - self.alpha * self.output) / self.sigma

    @property
    def x0(self) -> Tensor:
        """The clean latents, (B, C, h, w)."""
        if self.kind == "sample":
            return self.output
        if self.kind == "v_prediction":
            return self.alpha * self.x_t - self.sigma * self.output
        return (self.x_t - self.sigma * self.output) / self.alpha

    @property
    def v(self) -> Tensor:
        """The velocity, (B, C, h, w)."""
        if self.kind == "v_prediction":
            return self.output
        return self.alpha * self.eps - self.sigma * self.x0
