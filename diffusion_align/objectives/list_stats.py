"""What every preference loss takes, whether on pairs, on lists or on single pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .pair_stats import PairStats


@dataclass(frozen=True)
class ListStats:
    """Mean squared prediction errors of B prompts with K pictures each; a pair is K = 2, an unpaired picture K = 1.

    All pictures of a prompt share timestep and noise, so that what they share cancels in differences.

    Attributes:
        error: of the policy, (B, K) float32, with a graph.
        reference: of the reference, (B, K) float32; None for reference-free losses.
        mask: (B, K) bool, which pictures there are; None: all.
        moved: m = mean (output - reference's output)^2, (B, K) float32 without graph: how far the policy has moved, in
            the space of the errors. mean d (output - reference's output) = (e + m - e_ref) / 2 for d = output - target.
        overlap: of pairs q = mean d_1 d_k, (B, K) float32 without graph: of each picture's d with the first one's; the
            second is <d_w, d_l>.
    """

    error: Tensor
    reference: Tensor | None = None
    mask: Tensor | None = None
    moved: Tensor | None = None
    overlap: Tensor | None = None

    @property
    def s(self) -> Tensor:
        """Advantage e_ref - e of the policy over the reference, (B, K).

        Raises:
            ValueError: there is no reference.
        """
        if self.reference is None:
            raise ValueError("this loss compares with a reference: ListStats needs reference")
        return self.reference - self.error

    @property
    def present(self) -> Tensor:
        """``mask``, (B, K) bool, also where it is None."""
        return torch.ones_like(self.error, dtype=torch.bool) if self.mask is None else self.mask

    def as_pairs(self) -> PairStats:
        """The view of K = 2, chosen first.

        Raises:
            ValueError: K is not 2, or a picture is missing.
        """
        if self.error.shape[1] != 2 or self.mask is not None:
            raise ValueError(f"expected pairs without a mask, found lists of {self.error.shape[1]}")
        (chosen, rejected), reference = self.error.unbind(1), self.reference
        return PairStats(
            chosen,
            rejected,
            None if reference is None else reference[:, 0],
            None if reference is None else reference[:, 1],
            moved=None if self.moved is None else self.moved.T,
            overlap=None if self.overlap is None else self.overlap[:, 1],
        )


@dataclass(frozen=True)
class Targets:
    """What is known of B examples. A loss reads what it needs, and names what is missing.

    Attributes:
        rank: of lists (B, K) integers: 0 is the best, ties are equal.
        p: of pairs (B,) in [0, 1], P(chosen is preferred); of unpaired pictures P(the label is right). None means 1.
        advantage: (B, K) float32: how much better than the others of its list a picture is, about 0 on average.
        win_rate: (B, K) in [0, 1]: mean probability to win against others; None: of the list's own ranks.
        label: of unpaired pictures (B,), +1 or -1.
        pair_beta: (B,) factors of beta.
    """

    rank: Tensor | None = None
    p: Tensor | None = None
    advantage: Tensor | None = None
    win_rate: Tensor | None = None
    label: Tensor | None = None
    pair_beta: Tensor | None = None

    def ranks(self) -> Tensor:
        """``rank``; raises ValueError where there is none."""
        return _needed(self.rank, "rank")

    def advantages(self) -> Tensor:
        """``advantage``; raises ValueError where there is none."""
        return _needed(self.advantage, "advantage")

    def labels(self) -> Tensor:
        """``label``; raises ValueError where there is none."""
        return _needed(self.label, "label")


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this loss needs targets with {name}")
    return value


def better(rank: Tensor, mask: Tensor) -> Tensor:
    """(B, K, K) bool: whether picture i ranks before picture j, and both are there."""
    both = mask[:, :, None] & mask[:, None, :]
    return (rank[:, :, None] < rank[:, None, :]) & both


def ranks_of(score: Tensor, mask: Tensor) -> Tensor:
    """Ranks (B, K) int64 of scores (B, K): how many pictures of the list are better. Those that are not there are 0."""
    return better(-score, mask).sum(dim=1)


def win_rates(rank: Tensor, mask: Tensor) -> Tensor:
    """Share of the other pictures of its list that each one ranks before, (B, K) float32; a tie is half a win.

    1/2 where there is no other.
    """
    before = better(rank, mask)
    others = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return 0.5 + 0.5 * (before.sum(dim=2) - before.sum(dim=1)) / others


def centred(score: Tensor, mask: Tensor) -> Tensor:
    """Scores (B, K) minus their list's mean; 0 where no picture is."""
    score = torch.where(mask, score, 0)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mask, score - score.sum(dim=1, keepdim=True) / count, 0)


def standardised(score: Tensor, mask: Tensor) -> Tensor:
    """``centred`` divided by the list's standard deviation (over n, so that two scores become +1 and -1).

    0 where all are equal, up to rounding.
    """
    found = centred(score, mask)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    spread = (found.square().sum(dim=1, keepdim=True) / count).sqrt()
    tiny = 1e-6 * torch.where(mask, score.abs(), 0).amax(dim=1, keepdim=True)
    return torch.where(spread > tiny, found / spread, 0)


def list_targets(rank: Tensor | None, score: Tensor | None, mask: Tensor, advantage: str) -> Targets:
    """Targets of ranked or scored lists.

    Args:
        rank: (B, K); None takes the order of ``score``.
        score: (B, K); None takes minus ``rank``, where ``advantage`` is not "score".
        advantage: "win_rate": share of the list that it beats, minus 1/2; "standardised": of the scores; "score": the
            scores themselves, minus their list's mean.

    Raises:
        ValueError: neither is there, or "score" without scores.
    """
    if rank is None:
        if score is None:
            raise ValueError("lists have neither rank nor score")
        rank = ranks_of(score, mask)
    if advantage == "win_rate":
        found = torch.where(mask, win_rates(rank, mask) - 0.5, 0)
    elif advantage == "score":
        if score is None:
            raise ValueError("list_advantage score needs lists with scores: these have ranks only")
        found = centred(score, mask)
    else:
        found = standardised(-rank.float() if score is None else score, mask)
    return Targets(rank=rank, advantage=found)
