"""Safeguards of pair losses: what is given to the rejected picture's gradient, its value unchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .losses.pair_losses import logit
from .pair_stats import PairStats


def safeguard_factor(
    stats: PairStats, mu: float, over: Literal["sample", "batch"] = "sample", weight: Tensor | None = None
) -> Tensor:
    """lambda = clip((1 - mu) e_w / q, 0, 1) where q = <d_w, d_l> is above 0, else 1 (Diffusion-SDPO, 2511.03317).

    With it a small step against the rejected picture does not raise the chosen one's error: in the space of the
    network's output, exactly for mu = 0, with something to spare above.

    Args:
        stats: with ``overlap``.
        over: lambda for each pair, (B,); or one for the batch, of the sums of e_w and q (the published code).
        weight: (B,) of the pairs in these sums; None weighs them alike, as the published code does.

    Returns:
        (B,) without a graph.

    Raises:
        ValueError: there is no overlap.
    """
    if stats.overlap is None:
        raise ValueError("the safeguard needs PairStats with overlap")
    e, q = stats.chosen.detach(), stats.overlap
    if over == "batch":
        w = torch.ones_like(e) if weight is None else weight.detach()
        e, q = ((w * part).sum().expand_as(e) for part in (e, q))
    found = ((1 - mu) * e / (q + 1e-9)).clamp(0, 1)
    return torch.where(q > 0, found, 1.0)


def weighted_factor(stats: PairStats, beta: float, mu: float, over: Literal["sample", "batch"]) -> Tensor:
    """``safeguard_factor`` with the weights sig(-u) that DPO gives pairs where there is a reference."""
    weight = torch.sigmoid(-logit(stats, beta)) if stats.has_reference else None
    return safeguard_factor(stats, mu, over, weight)


def with_rejected_gradient(stats: PairStats, factor: Tensor) -> PairStats:
    """The statistics, whose rejected errors keep their values and pass ``factor`` (B,) of their gradient on."""
    fixed = stats.rejected.detach()
    return replace(stats, rejected=fixed + factor * (stats.rejected - fixed))


def swapped(stats: PairStats, where: Tensor) -> PairStats:
    """The statistics with chosen and rejected exchanged in the pairs of ``where`` (B,) bool.

    The overlap is the same for both orders.
    """

    def exchanged(first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if first is None or second is None:
            return first, second
        return torch.where(where, second, first), torch.where(where, first, second)

    chosen, rejected = exchanged(stats.chosen, stats.rejected)
    ref_chosen, ref_rejected = exchanged(stats.ref_chosen, stats.ref_rejected)
    assert chosen is not None
    assert rejected is not None
    moved = None if stats.moved is None else torch.where(where, stats.moved.flip(0), stats.moved)
    return PairStats(chosen, rejected, ref_chosen, ref_rejected, moved, stats.overlap)
