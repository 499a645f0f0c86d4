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
    rewards: Tensor,
    group_size: int,
    *,
    baseline: str = "group",
    scale: str = "group",
    history: tuple[Tensor, Tensor] | None = None,
    std_floor: float = 1e-4,
    clip: float = 5.0,
) -> Tensor:
    """Advantages (N,) float32: (r - m) / spread, clipped; GRPO (2402.03300) compares with the same prompt's samples.

    Deviations are those of whole populations, without Bessel's correction. A group of equal rewards has advantages of
    exactly 0 (with the group as baseline).

    Args:
        rewards: (N,), the ``group_size`` samples of a prompt next to each other.
        baseline: m is the mean of the "group", of the whole "batch", or of the prompt's "history".
        scale: "group" divides by each group's own standard deviation (with the history as baseline, by its), "batch" by
            the root mean square of all r - m (a group whose rewards hardly differ then moves little, instead of having
            its noise blown up), "global" by the standard deviation of all rewards, "none" by nothing.
        history: mean and deviation of what each prompt's samples got so far, each (N / group_size,).
        std_floor: smallest deviation divided by.
        clip: largest absolute advantage.

    Raises:
        ValueError: the number of rewards is no multiple of ``group_size``; another ``baseline`` or ``scale``; no
            ``history`` where one is compared with.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards cannot be split into groups of {group_size}")
    groups = rewards.float().view(-1, group_size)
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    own_mean = torch.where(equal, groups[:, :1], groups.mean(dim=1, keepdim=True))  # which may be off in the last bits
    own_std = (groups - own_mean).square().mean(dim=1, keepdim=True).sqrt()
    if baseline == "history":
        if history is None:
            raise ValueError("baseline = 'history' needs history, the mean and deviation of each prompt's rewards")
        mean, own_std = (part.to(groups).view(-1, 1) for part in history)
    elif baseline in ("group", "batch"):
        mean = own_mean if baseline == "group" else groups.mean()
    else:
        raise ValueError(f"baseline = {baseline!r}: expected 'group', 'batch' or 'history'")
    centred = groups - mean
    spreads = {
        "group": own_std,
        "batch": centred.square().mean().sqrt(),
        "global": groups.std(correction=0),
        "none": torch.ones(()),
    }
    if scale not in spreads:
        raise ValueError(f"scale = {scale!r}: expected 'group', 'batch', 'global' or 'none'")
    return (centred / spreads[scale].clamp(min=std_floor)).clamp(-clip, clip).flatten()
