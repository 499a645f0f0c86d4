"""One reverse step of a sampler as a Gaussian, and how it moves with the prediction."""

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


def ddim_step(x_t: Tensor, x0: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, eta: float) -> GaussianStep:
    """DDIM's step from ``x_t`` (B, C, h, w) with predicted clean latents ``x0``.

    std^2 = eta^2 (1 - ab') / (1 - ab) (1 - ab / ab'); mean = sqrt(ab') x0 + sqrt(1 - ab' - std^2) eps. eta = 1 is the
    DDPM posterior.

    Args:
        alpha_bar, alpha_bar_next: (B,) or (B, 1, 1, 1), before and after the step.
    """
    now, after = alpha_bar.view(-1, 1, 1, 1), alpha_bar_next.view(-1, 1, 1, 1)
    eps = (x_t - now.sqrt() * x0) / (1 - now).sqrt()
    variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
    mean = after.sqrt() * x0 + (1 - after - variance).clamp(min=0).sqrt() * eps
    return GaussianStep(mean, variance.clamp(min=0).sqrt())


def sensitivity(alpha_bar: Tensor, alpha_bar_next: Tensor, eta: float) -> Tensor:
    """(d mean / d eps)^2 / (2 std^2) of the denoiser's noise prediction, (B,): how far a step's ratio moves.

    It differs by orders of magnitude between the steps of one trajectory, so that a few of them fill every clip range
    and every gradient; divide log-ratios by it to make steps count alike (as GRPO-Guard, 2510.22319, does).
    """
    variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    slope = (1 - alpha_bar_next - variance).clamp(min=0).sqrt() - (alpha_bar_next * (1 - alpha_bar) / alpha_bar).sqrt()
    return slope**2 / (2 * variance)
