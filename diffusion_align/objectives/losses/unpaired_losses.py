"""Losses on single pictures with a label y = +1 (liked) or -1 (disliked). r = b s = 0.5 beta (e_ref - e)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..list_stats import ListStats, Targets
from .loss_tables import unpaired_loss


@unpaired_loss()
def kto(
    stats: ListStats, targets: Targets, beta: float, shift: Tensor,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """w_y (1 - sig(y (r - z))) (Diffusion-KTO, 2404.04465), z = max(0, ``shift``), the mean reward.

    The official code has no factor 1/2 in r: its beta 1000 is our 2000.
    """
    y = targets.labels()
    z = shift.clamp(min=0)
    return _weight(y, desirable_weight, undesirable_weight) * (1 - torch.sigmoid(y * (_reward(stats, beta) - z)))


@unpaired_loss(balanced=True)
def bco(
    stats: ListStats, targets: Targets, beta: float, shift: Tensor,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """-w_y log sig(y (r - d)) (BCO, 2404.04656), d = ``shift``, halfway between the mean rewards of both labels."""
    y = targets.labels()
    return -_weight(y, desirable_weight, undesirable_weight) * logsigmoid(y * (_reward(stats, beta) - shift))


def _reward(stats: ListStats, beta: float) -> Tensor:
    return 0.5 * beta * stats.s.squeeze(1)


def _weight(label: Tensor, desirable: float, undesirable: float) -> Tensor:
    return torch.where(label > 0, desirable, undesirable)
