"""Preference losses on pairs: small pure functions of :class:`PairStats`.

Notation: b = 0.5 * beta (the convention of the official Diffusion-DPO code), s = e_ref - e, rewards r = b * s,
u = r_w - r_l. Every function returns the loss of each pair, (B,) float32; names follow TRL where it has the loss.
``beta`` is a number, or (B,) where pairs have their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..pair_stats import PairStats
from .loss_tables import pair_loss


def rewards(stats: PairStats, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Implicit rewards (r_w, r_l), each (B,): b * (e_ref - e)."""
    return 0.5 * beta * stats.s_w, 0.5 * beta * stats.s_l


def mean_reward(stats: PairStats, beta: float | Tensor) -> Tensor:
    """Mean of all rewards of the batch, a scalar without gradient."""
    return torch.cat(rewards(stats, beta)).mean().detach()


def logit(stats: PairStats, beta: float | Tensor) -> Tensor:
    """u = r_w - r_l, (B,): the log-odds, under the policy, that chosen is preferred (2311.12908, eq. 14)."""
    r_w, r_l = rewards(stats, beta)
    return r_w - r_l


@pair_loss(label_smoothing=True, soft_labels=True)
def sigmoid(
    stats: PairStats, beta: float | Tensor, label_smoothing: float = 0.0, soft_labels: Tensor | None = None
) -> Tensor:
    """-p log sig(u) - (1 - p) log sig(-u). p = 1: Diffusion-DPO (2311.12908).

    ``label_smoothing`` eps mixes p towards 1 - p (cDPO: p = 1 - eps); ``soft_labels`` (B,) in [0, 1] are P(chosen is
    preferred).
    """
    u = logit(stats, beta)
    p = torch.ones_like(u) if soft_labels is None else soft_labels.to(u)
    p = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return -p * logsigmoid(u) - (1 - p) * logsigmoid(-u)


@pair_loss(label_smoothing=True)
def robust(stats: PairStats, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """[-(1 - eps) log sig(u) + eps log sig(-u)] / (1 - 2 eps): unbiased when a share eps is flipped (2403.00409)."""
    u = logit(stats, beta)
    return (-(1 - label_smoothing) * logsigmoid(u) + label_smoothing * logsigmoid(-u)) / (1 - 2 * label_smoothing)


@pair_loss()
def hinge(stats: PairStats, beta: float | Tensor) -> Tensor:
    """relu(1 - u) (SLiC, 2305.10425)."""
    return torch.relu(1 - logit(stats, beta))


@pair_loss(soft_labels=True, target=True)
def ipo(
    stats: PairStats, beta: float | Tensor, soft_labels: Tensor | None = None, target: Tensor | None = None
) -> Tensor:
    """(u - 1/2)^2: IPO's (D - 1 / (2 b))^2 (2310.12036, eq. 17) with D = s_w - s_l, times b^2.

    The factor leaves the optimum where it is. Without it the loss is about 1e-8 at beta = 5000, and its gradients
    vanish beside AdamW's epsilon. ``soft_labels`` (B,) p in [0, 1] put p - 1/2 in the place of 1/2, ``target`` (B,) a
    number for each pair, e.g. a difference of scores (CaPO, 2502.02588).
    """
    u = logit(stats, beta)
    if target is not None:
        return (u - target.to(u)).square()
    return (u - (0.5 if soft_labels is None else soft_labels.to(u) - 0.5)).square()


@pair_loss(eta=True)
def linear(stats: PairStats, beta: float | Tensor, eta: float = 1e-3) -> Tensor:
    """b w (e_w - e_l), w = clip(0.5 - 0.4 u, eta, 1 - eta) without gradient (Linear-DPO, 2605.21123).

    The published code has no factor b. With it the gradient at u = 0 is that of ``sigmoid``. The weight reaches its
    floor ``eta`` at u = 1.25, where the sigmoid's has a long tail. Its value may be negative.
    """
    weight = (0.5 - 0.4 * logit(stats, beta).detach()).clamp(eta, 1 - eta)
    return 0.5 * beta * weight * (stats.chosen - stats.rejected)


@pair_loss(shift=True)
def kto(
    stats: PairStats,
    beta: float | Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    shift: Tensor | None = None,
) -> Tensor:
    """Diffusion-KTO (2404.04465): half of w_d (1 - sig(r_w - z)) + w_u (1 - sig(z - r_l)).

    The reference point is z = max(0, ``shift``), a running mean of rewards; None takes this batch's, without gradient.
    """
    r_w, r_l = rewards(stats, beta)
    z = (mean_reward(stats, beta) if shift is None else shift).clamp(min=0)
    chosen, rejected = 1 - torch.sigmoid(r_w - z), 1 - torch.sigmoid(z - r_l)
    return 0.5 * (desirable_weight * chosen + undesirable_weight * rejected)


@pair_loss(shift=True)
def bco_pair(stats: PairStats, beta: float | Tensor, shift: Tensor | None = None) -> Tensor:
    """-log sig(r_w - d) - log sig(d - r_l) (BCO, 2404.04656); ``shift`` d is a running mean of rewards.

    None takes the mean of this batch's rewards, without gradient. For a single pair that leaves -2 log sig(u / 2).
    """
    r_w, r_l = rewards(stats, beta)
    d = mean_reward(stats, beta) if shift is None else shift
    return -logsigmoid(r_w - d) - logsigmoid(d - r_l)


@pair_loss()
def sppo_hard(stats: PairStats, beta: float | Tensor) -> Tensor:
    """(r_w - 1/2)^2 + (r_l + 1/2)^2: SPPO's (s_w - 1/(2 b))^2 + (s_l + 1/(2 b))^2 (2405.00675, eq. 4.7), times b^2."""
    r_w, r_l = rewards(stats, beta)
    return (r_w - 0.5).square() + (r_l + 0.5).square()


@pair_loss(label_smoothing=True)
def exo_pair(stats: PairStats, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """KL(sig(u) || 1 - eps) (EXO, 2402.00856, eq. 16); eps is ``label_smoothing``, at least 1e-3 to stay finite."""
    u, eps = logit(stats, beta), max(label_smoothing, 1e-3)
    target = torch.log(torch.tensor([1 - eps, eps], dtype=u.dtype, device=u.device))
    return u.sigmoid() * (logsigmoid(u) - target[0]) + (-u).sigmoid() * (logsigmoid(-u) - target[1])


@pair_loss(label_smoothing=True)
def dmpo(stats: PairStats, beta: float | Tensor, label_smoothing: float = 0.01) -> Tensor:
    """``exo_pair`` with DMPO's alpha: KL(sig(u) || 1 - alpha) (2507.07510), alpha 0.01 where ``label_smoothing`` is 0.

    Its gradient vanishes once sig(u) = 1 - alpha, which stops by itself. Published beta: 2000 on SD 1.5, 6000 on SDXL.
    """
    return exo_pair(stats, beta, label_smoothing)


@pair_loss()
def apo_zero(stats: PairStats, beta: float | Tensor) -> Tensor:
    """1 - sig(r_w) + sig(r_l) (APO, 2408.06266): for chosen images better than the model's own."""
    r_w, r_l = rewards(stats, beta)
    return 1 - r_w.sigmoid() + r_l.sigmoid()


@pair_loss()
def apo_down(stats: PairStats, beta: float | Tensor) -> Tensor:
    """sig(r_w) + 1 - sig(u) (APO, 2408.06266): for chosen images worse than the model's own."""
    r_w, r_l = rewards(stats, beta)
    return r_w.sigmoid() + 1 - (r_w - r_l).sigmoid()


@pair_loss()
def nca_pair(stats: PairStats, beta: float | Tensor) -> Tensor:
    """-log sig(r_w) - log sig(-r_w) / 2 - log sig(-r_l) / 2 (NCA, 2402.05369): keeps chosen images likely."""
    r_w, r_l = rewards(stats, beta)
    return -logsigmoid(r_w) - 0.5 * logsigmoid(-r_w) - 0.5 * logsigmoid(-r_l)


@pair_loss(needs_reference=False)
def mapo(stats: PairStats, beta: float | Tensor, k: float = 0.5, num_timesteps: int = 1000) -> Tensor:
    """e_w - beta log sig(T (g(e_w) - g(e_l))), g(e) = k e / (exp(k e) - 1) (MaPO, 2406.06424); published beta 0.1.

    Reference-free; beta here is the weight of the preference term, not the pull to a reference.
    """
    g_w, g_l = (k * e / torch.expm1(k * e) for e in (stats.chosen, stats.rejected))
    return stats.chosen - beta * logsigmoid(num_timesteps * (g_w - g_l))


@pair_loss(needs_reference=False)
def asft(stats: PairStats, beta: float | Tensor) -> Tensor:
    """k e_w - log(1 - exp(-k e_l)), k = ``beta`` (ASFT, 2409.10571): -log p_w - log(1 - p_l) with p = exp(-k e).

    Reference-free. The rejected picture's gradient is about 1 / e_l, so that high noise, where errors are small,
    dominates; ``nca_pair`` is its form with a reference.
    """
    return beta * stats.chosen - torch.log(-torch.expm1(-beta * stats.rejected))


@pair_loss(label_smoothing=True, across_batch=True)
def aot(stats: PairStats, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sig(b (D_(i) - F_(i))) (AOT for pairs, 2406.05882): sorted margins of the policy, D = e_l - e_w, against
    sorted margins of the reference, F, so that the policy's margins are larger as a distribution, not pair by pair.

    The loss of rank i belongs to the pair whose D has that rank. A single pair leaves ``sigmoid``.
    """
    assert stats.ref_chosen is not None
    assert stats.ref_rejected is not None
    ranked, order = (stats.rejected - stats.chosen).sort()
    reference = (stats.ref_rejected - stats.ref_chosen).sort().values
    return _stochastic_dominance(0.5 * beta * (ranked - reference), label_smoothing)[order.argsort()]


@pair_loss(label_smoothing=True, across_batch=True)
def aot_unpaired(stats: PairStats, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sig(r_w(i) - r_l(i)) (AOT without pairs, 2406.05882): sorted rewards of chosen images against sorted rewards
    of rejected ones.

    The loss of rank i belongs to the pair whose chosen image has that rank. A single pair leaves ``sigmoid``.
    """
    r_w, r_l = rewards(stats, beta)
    ranked, order = r_w.sort()
    return _stochastic_dominance(ranked - r_l.sort().values, label_smoothing)[order.argsort()]


def _stochastic_dominance(difference: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) log sig(d) - eps log sig(-d) of differences of quantiles, (B,)."""
    return -(1 - label_smoothing) * logsigmoid(difference) - label_smoothing * logsigmoid(-difference)


@pair_loss(needs_reference=False, compares=False)
def sft(stats: PairStats, beta: float | Tensor) -> Tensor:
    """e_w: denoising of the chosen image alone, without ``beta``; one of several losses (as in MPO, 2411.10442)."""
    return stats.chosen
