"""What a denoiser says of a noisy latent, read as noise, clean latent or velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


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
