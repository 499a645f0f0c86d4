"""Preference losses on pairs: small pure functions of :class:`PairStats`.

Notation: b = 0.5 * beta (the convention of the official Diffusion-DPO code), s = e_ref - e, rewards r = b * s,
u = r_w - r_l. Every function returns the loss of each pair, (B,) float32; names follow TRL where it has the loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
        compares: whether it looks at both pictures of a pair.
        across_batch: whether a pair's loss depends on where it stands among the other pairs of the batch.
    """

    function: Callable[..., Tensor]
    label_smoothing: bool = False
    soft_labels: bool = False
    needs_reference: bool = True
    shift: bool = False
    compares: bool = True
    across_batch: bool = False


#: By name; filled by ``pair_loss``.
PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}


def pair_loss(**facts: bool) -> Callable[[F], F]:
    """Register a function as the ``loss_type`` of its name; the settings' choices and the tests follow.

    Args:
        facts: fields of :class:`PreferenceLoss`.
    """

    def register(function: F) -> F:
        PREFERENCE_LOSSES[function.__name__] = PreferenceLoss(function, **facts)
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


@pair_loss(label_smoothing=True, across_batch=True)
def aot(stats: PairStats, beta: float, label_smoothing: float = 0.0) -> Tensor:
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
def aot_unpaired(stats: PairStats, beta: float, label_smoothing: float = 0.0) -> Tensor:
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
def sft(stats: PairStats, beta: float) -> Tensor:
    """e_w: denoising of the chosen image alone, without ``beta``; one of several losses (as in MPO, 2411.10442)."""
    return stats.chosen


def check_losses(loss_types: Sequence[str], loss_weights: Sequence[float] | None = None) -> None:
    """Whether losses can be added up.

    Raises:
        ValueError: there is none, one is unknown or named twice, weights are not one for each and positive, or losses
            with and without a reference, whose ``beta`` are different things, are mixed.
    """
    if not loss_types:
        raise ValueError("loss_type is empty: expected at least one loss")
    for name in loss_types:
        if name not in PREFERENCE_LOSSES:
            near = difflib.get_close_matches(name, PREFERENCE_LOSSES, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown loss_type {name!r}{hint} Available: {', '.join(PREFERENCE_LOSSES)}")
        if loss_types.count(name) > 1:
            raise ValueError(f"loss_type names {name!r} twice: give it one weight in loss_weights")
    if loss_weights is not None and len(loss_weights) != len(loss_types):
        raise ValueError(f"loss_weights has {len(loss_weights)} numbers for {len(loss_types)} losses: one for each")
    if any(not weight > 0 for weight in loss_weights or ()):
        raise ValueError(f"loss_weights {list(loss_weights or ())}: expected numbers above 0")
    free, bound = (
        [n for n in loss_types if PREFERENCE_LOSSES[n].compares and PREFERENCE_LOSSES[n].needs_reference == needed]
        for needed in (False, True)
    )
    if free and bound:
        raise ValueError(
            f"loss_type {free[0]!r} has no reference, so that its beta is not that of {bound[0]!r}: give one of them"
        )


def preference_loss(
    loss_type: str | Sequence[str],
    stats: PairStats,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    soft_labels: Tensor | None = None,
    sample_weight: Tensor | None = None,
    shift: Tensor | None = None,
    loss_weights: Sequence[float] | None = None,
) -> LossOutput:
    """Mean loss of a batch of pairs, with the metrics everyone plots.

    Args:
        loss_type: a name of ``PREFERENCE_LOSSES``, or several, which are added up.
        beta: strength of the pull to the reference (about 2000 to 5000 for SD; see ``mapo`` for its own).
        label_smoothing: assumed share of flipped labels, [0, 0.5).
        soft_labels: (B,) probabilities that chosen is preferred; None means 1.
        sample_weight: (B,) factors of the pairs' losses; the mean is over B, not over the weights.
        shift: scalar, the running mean of rewards that ``kto`` and ``bco_pair`` compare with; None: this batch's.
        loss_weights: a factor for each of several losses; None is 1 for all.

    Returns:
        Metrics: ``implicit_accuracy`` (share of u > 0), ``margin`` (mean u), ``error_chosen``, ``error_rejected``,
        ``rewards/chosen``, ``rewards/rejected``, ``chosen_error_up`` (share of pairs whose chosen image the policy
        predicts worse than the reference does). Reference-free losses give the errors and ``implicit_accuracy``, the
        share of e_w < e_l. Of several losses each one's mean, unweighted, is ``loss/NAME``.

    Raises:
        ValueError: losses that ``check_losses`` refuses; missing reference errors; an option that the loss does not
            have (of several losses: every one that compares pictures must have it).
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    check_losses(names, loss_weights)
    unmet = [name for name in names if PREFERENCE_LOSSES[name].needs_reference and not stats.has_reference]
    if unmet:
        raise ValueError(f"loss_type {unmet[0]!r} needs reference errors (ref_chosen, ref_rejected)")
    given = {"label_smoothing": label_smoothing or None, "soft_labels": soft_labels, "shift": shift}
    _check_options(names, given)
    parts = {name: PREFERENCE_LOSSES[name].function(stats, beta, **_taken(name, given)) for name in names}
    weights = [1.0] * len(names) if loss_weights is None else loss_weights
    per_sample = torch.stack([weight * part for weight, part in zip(weights, parts.values(), strict=True)]).sum(dim=0)
    weighted = per_sample if sample_weight is None else per_sample * sample_weight.to(per_sample)
    metrics = _metrics(stats, beta)
    if len(names) > 1:
        metrics |= {f"loss/{name}": part.detach().mean() for name, part in parts.items()}
    return LossOutput(weighted.mean(), per_sample, metrics)


#: What an error says of a loss without an option, and of those that have it.
_WITHOUT: Mapping[str, str] = MappingProxyType(
    {
        "label_smoothing": "has no label_smoothing: {} have",
        "soft_labels": "takes no soft labels: {} does",
        "shift": "takes no shift: {} do",
    }
)


def _taken(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given and that loss ``name`` has."""
    return {
        option: value
        for option, value in given.items()
        if value is not None and getattr(PREFERENCE_LOSSES[name], option)
    }


def _check_options(names: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises ValueError where an option would be ignored; only some losses know the mean reward (shift)."""
    for option, value in given.items():
        without = [name for name in names if not getattr(PREFERENCE_LOSSES[name], option)]
        bad = [name for name in without if option != "shift" and PREFERENCE_LOSSES[name].compares]
        if value is not None and (bad or len(without) == len(names)):
            having = ", ".join(name for name, loss in PREFERENCE_LOSSES.items() if getattr(loss, option))
            raise ValueError(f"loss_type {[*bad, *without][0]!r} {_WITHOUT[option].format(having)}")


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
