"""The loss of a batch of pairs: one loss or several, their options, and the metrics everyone plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from diffusion_align.names import nearest

from .losses.loss_tables import PREFERENCE_LOSSES, PreferenceLoss, pair_loss
from .losses.pair_losses import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    exo_pair,
    hinge,
    ipo,
    kto,
    logit,
    mapo,
    mean_reward,
    nca_pair,
    rewards,
    robust,
    sft,
    sigmoid,
    sppo_hard,
)
from .pair_stats import LossOutput, PairStats

#: Losses that could be imported from here before they had files of their own still can.
__all__ = [
    "PREFERENCE_LOSSES", "PreferenceLoss", "aot", "aot_unpaired", "apo_down", "apo_zero", "bco_pair", "check_losses",
    "exo_pair", "hinge", "ipo", "kto", "logit", "mapo", "mean_reward", "nca_pair", "pair_loss", "preference_loss",
    "rewards", "robust", "sft", "sigmoid", "sppo_hard",
]  # fmt: skip


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
            near = nearest(name, PREFERENCE_LOSSES)
            hint = f", did you mean {near!r}?" if near else ""
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
    target: Tensor | None = None,
    eta: float | None = None,
    pair_beta: Tensor | None = None,
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
        target: (B,) what ``ipo`` brings u to; None: 1/2.
        eta: the least weight of ``linear``; None: its own.
        pair_beta: (B,) factors of ``beta`` (SmPO, 2506.02698: kappa (2 p - 1)); metrics are those of ``beta``.

    Returns:
        Metrics: ``implicit_accuracy`` (share of u > 0), ``margin`` (mean u), ``abs_margin`` (mean |u|),
        ``gradient_factor`` (mean sig(-u), the gradients' weight in ``sigmoid``), ``error_chosen``, ``error_rejected``,
        ``rewards/chosen``, ``rewards/rejected``, ``chosen_error_up`` (share of pairs whose chosen image the policy
        predicts worse than the reference does). Reference-free losses give the errors and ``implicit_accuracy``, the
        share of e_w < e_l. Of several losses each one's mean, unweighted, is ``loss/NAME``. Where the statistics have
        them: ``moved``, the mean of m over both pictures, and ``kappa``, the mean of <d_w, d_l> / e_w: above 1, a step
        against the rejected picture raises the chosen one's error.

    Raises:
        ValueError: losses that ``check_losses`` refuses; missing reference errors; an option that the loss does not
            have (of several losses: every one that compares pictures must have it).
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    check_losses(names, loss_weights)
    unmet = [name for name in names if PREFERENCE_LOSSES[name].needs_reference and not stats.has_reference]
    if unmet:
        raise ValueError(f"loss_type {unmet[0]!r} needs reference errors (ref_chosen, ref_rejected)")
    given = {
        "label_smoothing": label_smoothing or None, "soft_labels": soft_labels, "shift": shift, "target": target,
        "eta": eta,
    }  # fmt: skip
    _check_options(names, given)
    strength = beta if pair_beta is None else beta * pair_beta
    parts = {name: PREFERENCE_LOSSES[name].function(stats, strength, **_taken(name, given)) for name in names}
    weights = [1.0] * len(names) if loss_weights is None else loss_weights
    per_sample = torch.stack([weight * part for weight, part in zip(weights, parts.values(), strict=True)]).sum(dim=0)
    weighted = per_sample if sample_weight is None else per_sample * sample_weight.to(per_sample)
    metrics = pair_metrics(stats, beta)
    if len(names) > 1:
        metrics |= {f"loss/{name}": part.detach().mean() for name, part in parts.items()}
    return LossOutput(weighted.mean(), per_sample, metrics)


#: What an error says of a loss without an option, and of those that have it.
_WITHOUT: Mapping[str, str] = MappingProxyType(
    {
        "label_smoothing": "has no label_smoothing: {} have",
        "soft_labels": "takes no soft labels: {} do",
        "shift": "takes no shift: {} do",
        "target": "takes no target: {} does",
        "eta": "has no eta: {} has",
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
def pair_metrics(stats: PairStats, beta: float) -> dict[str, Tensor]:
    """The metrics of ``preference_loss``."""
    metrics = {"error_chosen": stats.chosen.mean(), "error_rejected": stats.rejected.mean()}
    if stats.moved is not None:
        metrics["moved"] = stats.moved.mean()
    if stats.overlap is not None:
        metrics["kappa"] = (stats.overlap / stats.chosen).mean()
    if not stats.has_reference:
        return metrics | {"implicit_accuracy": (stats.chosen < stats.rejected).float().mean()}
    r_w, r_l = rewards(stats, beta)
    u = r_w - r_l
    return metrics | {
        "implicit_accuracy": (r_w > r_l).float().mean(),
        "margin": u.mean(),
        "abs_margin": u.abs().mean(),
        "gradient_factor": torch.sigmoid(-u).mean(),
        "rewards/chosen": r_w.mean(),
        "rewards/rejected": r_l.mean(),
        "chosen_error_up": (r_w < 0).float().mean(),
    }
