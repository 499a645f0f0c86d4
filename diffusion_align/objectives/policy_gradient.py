"""Denoising as a policy: the Gaussian step of DDIM, its log-probability, and losses on its ratio.

A sampling step x_t -> x_s (s < t) with fresh noise is a Gaussian policy (DDPO, 2305.13301; DDIM's step is 2010.02502,
eq. 12 and 16). Everything is float32: the ratio of two log-probabilities must be exactly 1 where nothing was learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi

import torch
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


def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float, sample_weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss (1707.06347, eq. 7): mean of w max(-A rho, -A clip(rho, 1 - c, 1 + c)).

    Args:
        log_prob: (B,) with a graph; rho = exp(log_prob - old_log_prob).
        advantage: (B,), positive for samples to be made likelier.
        sample_weight: (B,) factors w, e.g. trust in each sample's reward.
    """
    ratio = (log_prob - old_log_prob).exp()
    losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    if sample_weight is not None:
        losses = losses * sample_weight
    outside = ((ratio - 1).abs() > clip_range).float().mean()
    log_ratio = (log_prob - old_log_prob).detach()
    metrics = {"ratio": ratio.detach().mean(), "clip_fraction": outside, "approx_kl": 0.5 * log_ratio.square().mean()}
    return losses.mean(), metrics


def group_advantages(
    rewards: Tensor, group_size: int, *, scale: str = "group", std_floor: float = 1e-4, clip: float = 5.0
) -> Tensor:
    """Advantages (N,) relative to the samples of the same prompt: (r - mean of the group) / std (GRPO, 2402.03300).

    Args:
        rewards: (N,), the ``group_size`` samples of a prompt next to each other.
        scale: "group" divides by each group's own standard deviation, "batch" by that of all deviations (a group whose
            rewards hardly differ then moves little, instead of having its noise blown up), "none" by nothing.
        std_floor: smallest deviation divided by.
        clip: largest absolute advantage.

    Raises:
        ValueError: the number of rewards is no multiple of ``group_size``, or another ``scale``.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards cannot be split into groups of {group_size}")
    groups = rewards.float().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group":
        spread = centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=std_floor)
    elif scale == "batch":
        spread = centred.square().mean().sqrt().clamp(min=std_floor)
    elif scale == "none":
        spread = torch.ones(())
    else:
        raise ValueError(f"scale = {scale!r}: expected 'group', 'batch' or 'none'")
    return (centred / spread).clamp(-clip, clip).flatten()
