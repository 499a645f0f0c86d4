"""Denoising as a policy: the Gaussian step of DDIM, its log-probability, and losses on its ratio.

A sampling step x_t -> x_s (s < t) with fresh noise is a Gaussian policy (DDPO, 2305.13301; DDIM's step is 2010.02502,
eq. 12 and 16). Everything is float32: the ratio of two log-probabilities must be exactly 1 where nothing was learned.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
