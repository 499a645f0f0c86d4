"""Preference losses on pairs: small pure functions of :class:`PairStats`.

Notation: b = 0.5 * beta (the convention of the official Diffusion-DPO code), s = e_ref - e, rewards r = b * s,
u = r_w - r_l. Every function returns the loss of each pair, (B,) float32; names follow TRL where it has the loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .pair_stats import LossOutput, PairStats

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss function and what it understands.

    Attributes:
        function: (stats, beta, **options) to the loss of each pair, (B,) float32.
        label_smoothing, soft_labels: whether it takes the option of that name.
        needs_reference: whether it reads the reference's errors.
        shift: whether rewards are compared with their mean, which is better known over many batches than in one.
    """

    function: Callable[..., Tensor]
    label_smoothing: bool = False
    soft_labels: bool = False
    needs_reference: bool = True
    shift: bool = False


#: By name; filled by ``pair_loss``.
PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}


def pair_loss(
    *, label_smoothing: bool = False, soft_labels: bool = False, needs_reference: bool = True, shift: bool = False
) -> Callable[[F], F]:
    """Register a function as the ``loss_type`` of its name; the settings' choices and the tests follow."""

    def register(function: F) -> F:
        loss = PreferenceLoss(function, label_smoothing, soft_labels, needs_reference, shift)
        PREFERENCE_LOSSES[function.__name__] = loss
        return function

    return register


def rewards(stats: PairStats, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards (r_w, r_l), each (B,): b * (e_ref - e)."""
    return 0.5 * beta * stats.s_w, 0.5 * beta * stats.s_l


def mean_reward(stats: PairStats, beta: float) -> Tensor:
    """Mean of all rewards of the batch, a scalar without gradient."""
    return torch.cat(rewards(stats, beta)).mean().detach()


def logit(stats: PairStats, beta: float) -> Tensor:
    """u = r_w - r_l, (B,): the log-odds, under the policy, that chosen is preferred (2311.12908, eq. 14)."""
    r_w, r_l = rewards(stats, beta)
    return r_w - r_l


@pair_loss(label_smoothing=True, soft_labels=True)
def sigmoid(stats: PairStats, beta: float, label_smoothing: float = 0.0, soft_labels: Tensor | None = None) -> Tensor:
    """-p log sig(u) - (1 - p) log sig(-u). p = 1: Diffusion-DPO (2311.12908).

    ``label_smoothing`` eps mixes p towards 1 - p (cDPO: p = 1 - eps); ``soft_labels`` (B,) in [0, 1] are P(chosen is
    preferred).
    """
    u = logit(stats, beta)
    p = torch.ones_like(u) if soft_labels is None else soft_labels.to(u)
    p = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return -p * logsigmoid(u) - (1 - p) * logsigmoid(-u)


@pair_loss(label_smoothing=True)
def robust(stats: PairStats, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[-(1 - eps) log sig(u) + eps log sig(-u)] / (1 - 2 eps): unbiased when a share eps is flipped (2403.00409)."""
    u = logit(stats, beta)
    return (-(1 - label_smoothing) * logsigmoid(u) + label_smoothing * logsigmoid(-u)) / (1 - 2 * label_smoothing)


@pair_loss()
def hinge(stats: PairStats, beta: float) -> Tensor:
    """relu(1 - u) (SLiC, 2305.10425)."""
    return torch.relu(1 - logit(stats, beta))


@pair_loss()
def ipo(stats: PairStats, beta: float) -> Tensor:
    """(u - 1/2)^2: IPO's (D - 1 / (2 b))^2 (2310.12036, eq. 17) with D = s_w - s_l, times b^2.

    The factor leaves the optimum where it is. Without it the loss is about 1e-8 at beta = 5000, and its gradients
    vanish beside AdamW's epsilon.
    """
    return (logit(stats, beta) - 0.5).square()


@pair_loss(shift=True)
def kto(
    stats: PairStats,
    beta: float,
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
def bco_pair(stats: PairStats, beta: float, shift: Tensor | None = None) -> Tensor:
    """-log sig(r_w - d) - log sig(d - r_l) (BCO, 2404.04656); ``shift`` d is a running mean of rewards.

    None takes the mean of this batch's rewards, without gradient. For a single pair that leaves -2 log sig(u / 2).
    """
    r_w, r_l = rewards(stats, beta)
    d = mean_reward(stats, beta) if shift is None else shift
    return -logsigmoid(r_w - d) - logsigmoid(d - r_l)


@pair_loss()
def sppo_hard(stats: PairStats, beta: float) -> Tensor:
    """(r_w - 1/2)^2 + (r_l + 1/2)^2: SPPO's (s_w - 1/(2 b))^2 + (s_l + 1/(2 b))^2 (2405.00675, eq. 4.7), times b^2."""
    r_w, r_l = rewards(stats, beta)
    return (r_w - 0.5).square() + (r_l + 0.5).square()


@pair_loss(label_smoothing=True)
def exo_pair(stats: PairStats, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """KL(sig(u) || 1 - eps) (EXO, 2402.00856, eq. 16); eps is ``label_smoothing``, at least 1e-3 to stay finite."""
    u, eps = logit(stats, beta), max(label_smoothing, 1e-3)
    target = torch.log(torch.tensor([1 - eps, eps], dtype=u.dtype, device=u.device))
    return u.sigmoid() * (logsigmoid(u) - target[0]) + (-u).sigmoid() * (logsigmoid(-u) - target[1])


@pair_loss()
def apo_zero(stats: PairStats, beta: float) -> Tensor:
    """1 - sig(r_w) + sig(r_l) (APO, 2408.06266): for chosen images better than the model's own."""
    r_w, r_l = rewards(stats, beta)
    return 1 - r_w.sigmoid() + r_l.sigmoid()


@pair_loss()
def apo_down(stats: PairStats, beta: float) -> Tensor:
    """sig(r_w) + 1 - sig(u) (APO, 2408.06266): for chosen images worse than the model's own."""
    r_w, r_l = rewards(stats, beta)
    return r_w.sigmoid() + 1 - (r_w - r_l).sigmoid()


@pair_loss()
def nca_pair(stats: PairStats, beta: float) -> Tensor:
    """-log sig(r_w) - log sig(-r_w) / 2 - log sig(-r_l) / 2 (NCA, 2402.05369): keeps chosen images likely."""
    r_w, r_l = rewards(stats, beta)
    return -logsigmoid(r_w) - 0.5 * logsigmoid(-r_w) - 0.5 * logsigmoid(-r_l)


@pair_loss(needs_reference=False)
def mapo(stats: PairStats, beta: float, k: float = 0.5, num_timesteps: int = 1000) -> Tensor:
    """e_w - beta log sig(T (g(e_w) - g(e_l))), g(e) = k e / (exp(k e) - 1) (MaPO, 2406.06424); published beta 0.1.

    Reference-free; beta here is the weight of the preference term, not the pull to a reference.
    """
    g_w, g_l = (k * e / torch.expm1(k * e) for e in (stats.chosen, stats.rejected))
    return stats.chosen - beta * logsigmoid(num_timesteps * (g_w - g_l))


def preference_loss(
    loss_type: str,
    stats: PairStats,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    soft_labels: Tensor | None = None,
    sample_weight: Tensor | None = None,
    shift: Tensor | None = None,
) -> LossOutput:
    """Mean loss of a batch of pairs, with the metrics everyone plots.

    Args:
        loss_type: a name of ``PREFERENCE_LOSSES``.
        beta: strength of the pull to the reference (about 2000 to 5000 for SD; see ``mapo`` for its own).
        label_smoothing: assumed share of flipped labels, [0, 0.5).
        soft_labels: (B,) probabilities that chosen is preferred; None means 1.
        sample_weight: (B,) factors of the pairs' losses; the mean is over B, not over the weights.
        shift: scalar, the running mean of rewards that ``kto`` and ``bco_pair`` compare with; None: this batch's.

    Returns:
        Metrics: ``implicit_accuracy`` (share of u > 0), ``margin`` (mean u), ``error_chosen``, ``error_rejected``,
        ``rewards/chosen``, ``rewards/rejected``, ``chosen_error_up`` (share of pairs whose chosen image the policy
        predicts worse than the reference does). Reference-free losses give the errors and ``implicit_accuracy``, the
        share of e_w < e_l.

    Raises:
        ValueError: unknown ``loss_type``; missing reference errors; an option that the loss does not have.
    """
    if loss_type not in PREFERENCE_LOSSES:
        near = difflib.get_close_matches(loss_type, PREFERENCE_LOSSES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown loss_type {loss_type!r}{hint} Available: {', '.join(PREFERENCE_LOSSES)}")
    loss = PREFERENCE_LOSSES[loss_type]
    if loss.needs_reference and not stats.has_reference:
        raise ValueError(f"loss_type {loss_type!r} needs reference errors (ref_chosen, ref_rejected)")
    options: dict[str, Any] = {}
    if label_smoothing:
        if not loss.label_smoothing:
            raise ValueError(f"loss_type {loss_type!r} has no label_smoothing: {_losses_with('label_smoothing')} have")
        options["label_smoothing"] = label_smoothing
    if soft_labels is not None:
        if not loss.soft_labels:
            raise ValueError(f"loss_type {loss_type!r} takes no soft labels: {_losses_with('soft_labels')} does")
        options["soft_labels"] = soft_labels
    if shift is not None:
        if not loss.shift:
            raise ValueError(f"loss_type {loss_type!r} takes no shift: {_losses_with('shift')} do")
        options["shift"] = shift
    per_sample = loss.function(stats, beta, **options)
    weighted = per_sample if sample_weight is None else per_sample * sample_weight.to(per_sample)
    return LossOutput(weighted.mean(), per_sample, _metrics(stats, beta))


def _losses_with(option: str) -> str:
    return ", ".join(name for name, loss in PREFERENCE_LOSSES.items() if getattr(loss, option))


@torch.no_grad()
def _metrics(stats: PairStats, beta: float) -> dict[str, Tensor]:
    metrics = {"error_chosen": stats.chosen.mean(), "error_rejected": stats.rejected.mean()}
    if not stats.has_reference:
        return metrics | {"implicit_accuracy": (stats.chosen < stats.rejected).float().mean()}
    r_w, r_l = rewards(stats, beta)
    return metrics | {
        "implicit_accuracy": (r_w > r_l).float().mean(),
        "margin": (r_w - r_l).mean(),
        "rewards/chosen": r_w.mean(),
        "rewards/rejected": r_l.mean(),
        "chosen_error_up": (r_w < 0).float().mean(),
    }
