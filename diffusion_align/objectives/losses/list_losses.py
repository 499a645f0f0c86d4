"""Losses on lists: K pictures of one prompt with ranks or advantages. r = b s = 0.5 beta (e_ref - e), n <= K pictures.

Every function returns the loss of each list, (B,). Pictures that the mask leaves out count nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..list_stats import ListStats, Targets, better, win_rates
from .loss_tables import list_loss


@list_loss(advantage="win_rate", options=("lair_lambda",))
def lair(stats: ListStats, targets: Targets, beta: float, lair_lambda: float = 1.0) -> Tensor:
    """(2 / n) sum_k (r_k - A_k / lambda)^2: LAIR (2605.26491) and soft SPPO (2405.00675), which are one loss.

    Every picture has a target of its own, so that the optimum is bounded. With A = P - 1/2 for the share P of its list
    that a picture beats, and lambda = 1, this is soft SPPO, and for K = 2 ``sppo_hard``.
    """
    present = stats.present
    off = torch.where(present, 0.5 * beta * stats.s - targets.advantages() / lair_lambda, 0)
    return 2 * off.square().sum(dim=1) / present.sum(dim=1).clamp(min=1)


@list_loss()
def plackett_luce(stats: ListStats, targets: Targets, beta: float) -> Tensor:
    """-sum_k [r_(k) - log sum_{j = k or worse} exp r_(j)] / (number of terms) (Diffusion-LPO, 2510.01540).

    A picture competes with itself and with all that rank behind it: without ties K - 1 terms; K = 2 is ``sigmoid``.
    Equal ranks do not compete with each other, and their terms are added up. A list without any order is 0.
    """
    r = 0.5 * beta * stats.s
    ahead = better(targets.ranks(), stats.present)
    beaten = ahead.any(dim=2)
    competes = ahead | torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    # The lowest number instead of -inf: the gradient of a row without any competitor would not be finite.
    low = torch.finfo(r.dtype).min
    total = torch.where(competes, r[:, None, :].expand(competes.shape), low).logsumexp(dim=2)
    return torch.where(beaten, total - r, 0).sum(dim=1) / beaten.sum(dim=1).clamp(min=1)


@list_loss(advantage="standardised")
def dgpo(stats: ListStats, targets: Targets, beta: float) -> Tensor:
    """-log sig((2 / n) sum_k A_k r_k) (DGPO, 2510.08425), one preference of a whole group over another.

    For K = 2 and A = +1, -1 it is ``sigmoid``.
    """
    present = stats.present
    gain = torch.where(present, targets.advantages() * 0.5 * beta * stats.s, 0).sum(dim=1)
    return -logsigmoid(2 * gain / present.sum(dim=1).clamp(min=1))


@list_loss()
def rankdpo(stats: ListStats, targets: Targets, beta: float) -> Tensor:
    """sum over i before j of |G_i - G_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)| (-log sig(r_i - r_j)) (2410.18013).

    G = 2^phi - 1 with phi the ``win_rate``; tau = 1, 2, ... is the present order by r, without gradient. Equal r, as at
    the start of a run, are ordered as the ranks say. The logarithm of the discount is the natural one.
    """
    r, rank, present = 0.5 * beta * stats.s, targets.ranks(), stats.present
    phi = win_rates(rank, present) if targets.win_rate is None else targets.win_rate
    gain = 2**phi - 1
    value = r.detach()
    ahead = (value[:, :, None] > value[:, None, :]) | (
        (value[:, :, None] == value[:, None, :]) & (rank[:, :, None] < rank[:, None, :])
    )
    position = (ahead & present[:, :, None] & present[:, None, :]).sum(dim=1) + 1
    discount = 1 / torch.log1p(position.to(r))
    weight = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
    losses = -weight * logsigmoid(r[:, :, None] - r[:, None, :])
    return torch.where(better(rank, present), losses, 0).sum(dim=(1, 2))


@list_loss(options=("d2o_alpha",))
def d2o(stats: ListStats, targets: Targets, beta: float, d2o_alpha: float = 1.0) -> Tensor:
    """-log sig(mean_k r_k - alpha mean r_l) (D2O, 2403.03419): away from bad pictures l, which rank last.

    The others, k, are meant to be drawn by the reference: anchors, not examples of what is good. A list without any
    order is 0. For K = 2 and alpha = 1 it is ``sigmoid``.
    """
    r, rank, present = 0.5 * beta * stats.s, targets.ranks(), stats.present
    last = present & (rank == torch.where(present, rank, rank.min()).amax(dim=1, keepdim=True))
    others = present & ~last
    bad, anchor = ((torch.where(m, r, 0).sum(dim=1) / m.sum(dim=1).clamp(min=1)) for m in (last, others))
    return torch.where(others.any(dim=1), -logsigmoid(anchor - d2o_alpha * bad), 0)
