"""One reverse step as a Gaussian over the next latents, its log-probability and divergence.

Everything is float32: the ratio of two log-probabilities must be exactly 1 where nothing was learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi

from torch import Tensor


@dataclass(frozen=True)
class GaussianStep:
    """N(mean, std^2 I) over the next latents.

    Attributes:
        mean: (B, C, h, w).
        std: (B, 1, 1, 1); 0 for a deterministic step, which has no density.
    """

    mean: Tensor
    std: Tensor

    def log_prob(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log-density of ``x`` (B, C, h, w), averaged over values, (B,).

        Args:
            weight: (B, 1, h, w), e.g. an inpainting mask: a weighted average over the places that matter.

        Raises:
            ValueError: a deterministic step (looked for on the CPU only; elsewhere the question would stall the device,
                and the density is not finite).
        """
        if self.std.device.type == "cpu" and bool((self.std <= 0).any()):
            raise ValueError("a deterministic step (std = 0) has no log-probability: leave it out, or sample with eta")
        return average(-((x - self.mean) ** 2) / (2 * self.std**2) - self.std.log() - 0.5 * log(2 * pi), weight)

    def kl(self, other: GaussianStep, weight: Tensor | None = None) -> Tensor:
        """KL divergence to a step of the same std, |mean - mean'|^2 / (2 std^2), averaged over values, (B,)."""
        return average((self.mean - other.mean) ** 2 / (2 * self.std**2), weight)


def average(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over all but the batch, (B,); with ``weight`` (B, 1, h, w) the weighted one."""
    dims = tuple(range(1, values.ndim))
    if weight is None:
        return values.mean(dim=dims)
    weight = weight.expand_as(values)
    return (values * weight).sum(dim=dims) / weight.sum(dim=dims).clamp(min=1e-8)
