"""Places on the way from an image to noise: x = alpha x0 + sigma eps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import torch
from torch import Tensor

from diffusion_align.devices import send

#: One number for a whole batch, or a tensor with one per image that broadcasts over latents.
Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Level(Generic[Number]):
    """How much image and how much noise there is in x = alpha x0 + sigma eps.

    Squares are kept beside their roots, because squaring a root loses the last bits.

    Attributes:
        alpha, sigma: shares of the clean latents and of the noise, at least 0.
        alpha_sq, sigma_sq: their squares; for variance-preserving paths alpha_bar and 1 - alpha_bar.
    """

    alpha: Number
    sigma: Number
    alpha_sq: Number
    sigma_sq: Number

    @staticmethod
    def from_alpha_bar(alpha_bar: Number) -> Level[Number]:
        """The variance-preserving level: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar)."""
        return Level(alpha_bar**0.5, (1 - alpha_bar) ** 0.5, alpha_bar, 1 - alpha_bar)

    def noise(self, x0: Tensor, eps: Tensor) -> Tensor:
        """alpha x0 + sigma eps, (B, C, h, w)."""
        return self.alpha * x0 + self.sigma * eps

    def x0(self, x: Tensor, eps: Tensor) -> Tensor:
        """The clean latents in ``x`` whose noise is ``eps``, (B, C, h, w)."""
        return (x - self.sigma * eps) / self.alpha

    def eps(self, x: Tensor, x0: Tensor) -> Tensor:
        """The noise in ``x`` whose clean latents are ``x0``, (B, C, h, w)."""
        return (x - self.alpha * x0) / self.sigma

    def flow_sigma(self) -> Number:
        """sigma / (alpha + sigma): the same noise-to-image ratio on the straight path (1 - s) x0 + s eps."""
        return self.sigma / (self.alpha + self.sigma)

    def preserving(self) -> Level[Number]:
        """The variance-preserving level with the same noise-to-image ratio, which is where ``rescaled`` latents are."""
        return self

    def rescaled(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) of this level as a variance-preserving path has them."""
        return x

    def map(self: Level[Tensor], function: Callable[[Tensor], Tensor]) -> Level[Tensor]:
        """The level with ``function`` applied to all four tensors."""
        return type(self)(*(function(getattr(self, field.name)) for field in fields(self)))

    def __getitem__(self: Level[Tensor], index: Tensor | slice | int) -> Level[Tensor]:
        return self.map(lambda values: values[index])

    def expand(self: Level[Tensor], count: int) -> Level[Tensor]:
        """One level for ``count`` images, (count, 1, 1, 1)."""
        return self.map(lambda values: values.view(1, 1, 1, 1).expand(count, 1, 1, 1))

    def to(self: Level[Tensor], device: torch.device | str) -> Level[Tensor]:
        """On ``device``, without waiting for the work that is queued there."""
        return self.map(lambda values: send(values, device))

    def column(self: Level[Tensor]) -> Level[Tensor]:
        """Of shape (B, 1, 1, 1), to broadcast over latents."""
        return self.map(lambda values: values.view(-1, 1, 1, 1))


@dataclass(frozen=True)
class StraightLevel(Level[Number]):
    """A place on the straight way of flow matching: alpha = 1 - sigma."""

    @staticmethod
    def from_sigma(sigma: Number) -> StraightLevel[Number]:
        """The level whose share of noise is ``sigma``, in [0, 1]."""
        return StraightLevel(1 - sigma, sigma, (1 - sigma) ** 2, sigma**2)

    def preserving(self) -> Level[Number]:
        return Level.from_alpha_bar(self.alpha_sq / (self.alpha_sq + self.sigma_sq))

    def rescaled(self, x: Tensor) -> Tensor:
        return x / (self.alpha_sq + self.sigma_sq) ** 0.5


def log_snr(alpha_bar: Tensor) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)), kept finite for a clean image; same shape, float32."""
    level = alpha_bar.float().clamp(1e-5, 1 - 1e-5)
    return level.log() - (1 - level).log()


def from_log_snr(log_snr: Tensor) -> Level[Tensor]:
    """The variance-preserving level with this log-SNR."""
    return Level.from_alpha_bar(torch.sigmoid(log_snr))
