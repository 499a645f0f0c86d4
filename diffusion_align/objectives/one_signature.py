"""Losses on pairs, lists and labelled pictures by one signature: statistics, targets, beta and options."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from diffusion_align.names import nearest

from .list_stats import ListStats, Targets, better

# The losses are imported to fill their tables.
from .losses import list_losses, unpaired_losses
from .losses.loss_tables import LIST_LOSSES, UNPAIRED_LOSSES
from .pair_stats import LossOutput
from .preference import PREFERENCE_LOSSES, preference_loss

__all__ = [
    "LIST_LOSSES", "UNPAIRED_LOSSES", "alignment_loss", "list_losses", "list_preference_loss", "unpaired_losses",
    "unpaired_preference_loss",
]  # fmt: skip


def alignment_loss(
    loss_type: str, stats: ListStats, targets: Targets, *, beta: float, sample_weight: Tensor | None = None,
    shift: Tensor | None = None, **options: float | None,
) -> LossOutput:  # fmt: skip
    """Mean loss of a batch, of whatever kind ``loss_type`` is.

    On labelled pictures where ``targets`` has labels (K = 1, ``UNPAIRED_LOSSES``), on lists (``LIST_LOSSES``), else on
    pairs (``PREFERENCE_LOSSES``).

    Args:
        sample_weight: (B,) factors; the mean is over B.
        shift: scalar, the running mean of rewards, for losses that compare with one.
        options: of the loss, as its function names them; None is its default.

    Raises:
        ValueError: an unknown loss; statistics, targets or options that it does not take.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if targets.label is not None:
        if shift is None:
            raise ValueError(f"loss_type {loss_type!r} compares rewards with their mean: expected shift")
        return unpaired_preference_loss(
            loss_type, stats, targets, beta=beta, shift=shift, sample_weight=sample_weight, **given
        )
    if loss_type in LIST_LOSSES:
        return list_preference_loss(loss_type, stats, targets, beta=beta, sample_weight=sample_weight, **given)
    target = None if targets.advantage is None else targets.advantage[:, 0] - targets.advantage[:, 1]
    return preference_loss(
        loss_type, stats.as_pairs(), beta=beta, soft_labels=targets.p, sample_weight=sample_weight, shift=shift,
        target=target, pair_beta=targets.pair_beta, **given,  # type: ignore[arg-type]
    )  # fmt: skip


def list_preference_loss(
    loss_type: str, stats: ListStats, targets: Targets, *, beta: float, sample_weight: Tensor | None = None,
    **options: float,
) -> LossOutput:  # fmt: skip
    """Mean loss of a batch of lists.

    Returns:
        Metrics are those of ``preference_loss``, and for K = 2 the same: ``implicit_accuracy`` (share of ordered pairs
        of pictures whose r is in that order), ``margin``, ``abs_margin`` and ``gradient_factor`` (of u = r_i - r_j of
        them), and of the best (``chosen``) and the worst pictures (``rejected``) of each list errors and rewards;
        ``chosen_error_up`` of the best; ``moved``.

    Raises:
        ValueError: no such loss; targets or options that it does not have.
    """
    check_name(loss_type, LIST_LOSSES)
    loss = LIST_LOSSES[loss_type]
    _check_given(loss_type, options, loss.options)
    per_sample = loss.function(stats, targets, beta, **options)
    return LossOutput(_weighted(per_sample, sample_weight), per_sample, list_metrics(stats, targets.ranks(), beta))


def unpaired_preference_loss(
    loss_type: str, stats: ListStats, targets: Targets, *, beta: float, shift: Tensor,
    sample_weight: Tensor | None = None, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> LossOutput:  # fmt: skip
    """Mean loss of a batch of labelled pictures (K = 1).

    Labels that are right with probability ``targets.p`` give p L(y) + (1 - p) L(-y).

    Args:
        shift: scalar, the running mean of rewards that the loss compares with.
        desirable_weight, undesirable_weight: factors of liked and of disliked pictures.

    Returns:
        Metrics: ``implicit_accuracy`` (share of pictures on the side of ``shift`` that their label says), ``error``,
        ``moved``.

    Raises:
        ValueError: no such loss; no labels, or lists of several pictures.
    """
    check_name(loss_type, UNPAIRED_LOSSES)
    if stats.error.shape[1] != 1:
        raise ValueError(f"loss_type {loss_type!r} takes single pictures, found lists of {stats.error.shape[1]}")
    function, label = UNPAIRED_LOSSES[loss_type].function, targets.labels()
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    per_sample = function(stats, targets, beta, shift, **weights)
    if targets.p is not None:
        p = targets.p.to(per_sample)
        per_sample = p * per_sample + (1 - p) * function(stats, Targets(label=-label), beta, shift, **weights)
    with torch.no_grad():
        reward = 0.5 * beta * stats.s.squeeze(1)
        metrics = {"implicit_accuracy": (label * (reward - shift) > 0).float().mean(), "error": stats.error.mean()}
        if stats.moved is not None:
            metrics["moved"] = stats.moved.mean()
    return LossOutput(_weighted(per_sample, sample_weight), per_sample, metrics)


def check_name(loss_type: str, known: Collection[str]) -> None:
    """Raises ValueError, with the nearest known name, where a loss is not in a table."""
    if loss_type not in known:
        near = nearest(loss_type, [*PREFERENCE_LOSSES, *LIST_LOSSES, *UNPAIRED_LOSSES])
        hint = f", did you mean {near!r}?" if near not in (None, loss_type) else ""
        raise ValueError(f"unknown loss_type {loss_type!r} here{hint} Available: {', '.join(known)}")


def _check_given(loss_type: str, given: Collection[str], taken: Sequence[str]) -> None:
    for name in given:
        if name not in taken:
            having = (
                ", ".join(other for other, loss in LIST_LOSSES.items() if name in loss.options) or "no loss on lists"
            )
            raise ValueError(f"loss_type {loss_type!r} has no {name}: {having} has")


def _weighted(per_sample: Tensor, weight: Tensor | None) -> Tensor:
    return per_sample.mean() if weight is None else (per_sample * weight.to(per_sample)).mean()


@torch.no_grad()
def list_metrics(stats: ListStats, rank: Tensor, beta: float) -> dict[str, Tensor]:
    """The metrics of ``list_preference_loss``."""
    present = stats.present
    ordered, r = better(rank, present), 0.5 * beta * stats.s
    apart = r[:, :, None] - r[:, None, :]
    best, worst = best_of(rank, present), best_of(-rank, present)
    metrics = {
        "implicit_accuracy": mean_where((apart > 0).to(r), ordered),
        "margin": mean_where(apart, ordered),
        "abs_margin": mean_where(apart.abs(), ordered),
        "gradient_factor": mean_where(torch.sigmoid(-apart), ordered),
        "error_chosen": mean_where(stats.error, best),
        "error_rejected": mean_where(stats.error, worst),
        "rewards/chosen": mean_where(r, best),
        "rewards/rejected": mean_where(r, worst),
        "chosen_error_up": mean_where((r < 0).to(r), best),
    }
    return metrics if stats.moved is None else metrics | {"moved": mean_where(stats.moved, present)}


def best_of(rank: Tensor, present: Tensor) -> Tensor:
    """(B, K) bool: the pictures of each list with its lowest rank."""
    first = torch.where(present, rank, rank.max()).amin(dim=1, keepdim=True)
    return present & (rank == first)


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the list's pictures (or pairs of them) in ``where``, then over the lists; a list without one is 0."""
    return means_where(values, where).mean()


def means_where(values: Tensor, where: Tensor) -> Tensor:
    """(B,) mean over each list's pictures (or pairs of them) in ``where``; of a list without one 0."""
    found, chosen = torch.where(where, values, 0).flatten(1), where.flatten(1)
    return found.sum(dim=1) / chosen.sum(dim=1).clamp(min=1)
