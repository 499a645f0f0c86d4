"""Losses that train scorers from judged pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy


def bradley_terry_loss(difference: Tensor, preferred: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of P(0 over 1) = sigmoid(difference) with soft labels; ties are 0.5 (PickScore, 2305.01569, eq. 3).

    Args:
        difference: (B, ...) score of image 0 minus that of image 1.
        preferred: like ``difference``, P(image 0 is preferred) in [0, 1]; NaN rows do not count.
        weight: (B,) of the pairs.

    Returns:
        The weighted mean over what was judged, a scalar; 0 if nothing was.
    """
    judged = ~preferred.isnan()
    losses = binary_cross_entropy_with_logits(difference, preferred.nan_to_num(0.5), reduction="none")
    factor = judged.to(losses)
    if weight is not None:
        factor = factor * weight.view(-1, *[1] * (losses.ndim - 1))
    return (losses * factor).sum() / factor.sum().clamp(min=1e-12)


def thurstone_logit(difference: Tensor, variance: Tensor) -> Tensor:
    """z of P(0 over 1) = Phi(z), z = difference / sqrt(2 variance): both scores have that variance (Thurstone, case V;
    DiNa-LRM, 2602.11146, where it grows with the noise). Same shape."""
    return difference / torch.sqrt(2 * variance)


def thurstone_loss(z: Tensor, preferred: Tensor) -> Tensor:
    """Cross-entropy of P(0 over 1) = Phi(z) with soft labels: -p log Phi(z) - (1 - p) log Phi(-z).

    A proper score, so that a learned variance is calibrated; DiNa-LRM's fidelity loss 1 - sqrt(P) is not.

    Args:
        z: (B, ...), as of ``thurstone_logit``.
        preferred: like ``z``, P(image 0 is preferred) in [0, 1]; NaN rows do not count.

    Returns:
        The mean over what was judged, a scalar; 0 if nothing was.
    """
    judged = ~preferred.isnan()
    label = preferred.nan_to_num(0.5)
    losses = -label * torch.special.log_ndtr(z) - (1 - label) * torch.special.log_ndtr(-z)
    return (losses * judged).sum() / judged.sum().clamp(min=1)


def uncertain_difference(mean: Tensor, variance: Tensor) -> Tensor:
    """Logit of E[sigmoid(z)] for z ~ N(mean, variance), by the probit approximation (HPSv3, EditReward).

    mean / sqrt(1 + pi variance / 8); within 0.02 of the integral in probability. Feed it to ``bradley_terry_loss``:
    a head that is unsure of a pair says so by a large variance and is punished less for a wrong order.
    """
    return mean / torch.sqrt(1 + math.pi * variance / 8)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (2103.00020) of unit embeddings (B, D); ``scale`` multiplies the cosines."""
    logits = scale * images @ texts.T
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
