"""DiffusionNFT (2509.16117): a reward-weighted denoising loss on two implicit policies; no likelihood, any sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align.process import average


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """Advantages (B,) clipped to [-clip, clip] as the probability r in [0, 1] that a sample is a good one."""
    return (advantage.clamp(-clip, clip) / clip + 1) / 2


def nft_loss(
    output: Tensor, old_output: Tensor, target: Tensor, optimal: Tensor, beta: float, weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean of [r |o+ - target|^2 / w+ + (1 - r) |o- - target|^2 / w-] / beta (eq. 5, with w and 1 / beta of the code).

    o+ = beta o + (1 - beta) o_old is pulled to good samples, o- = (1 + beta) o_old - beta o to bad ones; |.|^2 are
    means over C, h, w. The w are the means of |o+ - target| and |o- - target|, without gradient and at least 1e-5: a
    loss is about as large as its error. The official code takes clean latents for o, and multiplies all by its largest
    advantage, 5.

    Args:
        output, old_output, target: (B, C, h, w), of the policy (with a graph), of the policy that drew the samples, and
            what both should predict (noise, velocity or clean latents): errors of clean latents weigh noisy timesteps
            more than errors of noise do.
        optimal: (B,) in [0, 1], see :func:`optimality`.
        weight: (B, 1, h, w), e.g. an inpainting mask.
    """
    old = old_output.detach()
    positive = beta * output + (1 - beta) * old
    negative = (1 + beta) * old - beta * output
    losses = []
    for prediction in (positive, negative):
        with torch.no_grad():
            scale = average((prediction - target).abs(), weight).clamp(min=1e-5)
        losses.append(average((prediction - target) ** 2, weight) / scale)
    total = (optimal * losses[0] + (1 - optimal) * losses[1]) / beta
    moved = average((output.detach() - old) ** 2, weight).mean()
    return total.mean(), {"positive_loss": losses[0].detach().mean(), "distance_to_old": moved}
