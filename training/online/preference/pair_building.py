"""From the rewards of a prompt's pictures to pairs or lists of them, and what is left out on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.training.engine.randomness import ITEMS, mix


def best_and_worst(reward: Tensor, count: int) -> Tensor:
    """The best with the worst, the second best with the second worst, ...: (P, count, 2), chosen first.

    Args:
        reward: (P, K) of the K pictures of P prompts; 2 * count <= K.
    """
    order = reward.argsort(dim=1, descending=True, stable=True)
    return torch.stack([order[:, :count], order.flip(1)[:, :count]], dim=2)


def all_pairs(reward: Tensor) -> Tensor:
    """Every two pictures of each prompt, (P, K (K - 1) / 2, 2): those of ``reward`` (P, K), chosen first."""
    two = torch.combinations(torch.arange(reward.shape[1]), 2)
    return chosen_first(reward, two.expand(len(reward), -1, -1))


def random_pairs(reward: Tensor, count: int, seeds: list[int]) -> Tensor:
    """``count`` of ``all_pairs``, (P, count, 2), drawn without repetition from each prompt's seed."""
    every = all_pairs(reward)
    taken = []
    for pairs, seed in zip(every, seeds, strict=True):
        shuffle = torch.Generator().manual_seed(mix(seed, ITEMS))
        taken.append(pairs[torch.randperm(len(pairs), generator=shuffle)[:count]])
    return torch.stack(taken)


def chosen_first(reward: Tensor, pairs: Tensor) -> Tensor:
    """Pairs (P, n, 2) of places in ``reward`` (P, K), each with the larger reward first."""
    first, second = (reward.gather(1, pairs[..., side]) for side in range(2))
    return torch.where((first >= second)[..., None], pairs, pairs.flip(2))


def paired_gap(reward: Tensor, pairs: Tensor) -> Tensor:
    """Reward of chosen minus that of rejected, (P, n)."""
    return reward.gather(1, pairs[..., 0]) - reward.gather(1, pairs[..., 1])


def paired_distance(latents: Tensor, pairs: Tensor) -> Tensor:
    """Root mean square of the difference of both latents of each pair, (P, n); ``latents`` (P, K, C, h, w)."""
    prompt = torch.arange(len(latents))[:, None]
    difference = latents[prompt, pairs[..., 0]] - latents[prompt, pairs[..., 1]]
    return difference.flatten(2).square().mean(dim=2).sqrt()


@dataclass(frozen=True)
class Filters:
    """What is left out.

    Attributes:
        min_spread: smallest deviation of a prompt's rewards.
        min_gap: pairs need more than this.
        min_distance: smallest root mean square of the difference of a pair's latents.
    """

    min_spread: float = 0.0
    min_gap: float = 0.0
    min_distance: float = 0.0


@dataclass(frozen=True)
class Counts:
    """What became of a round's prompts and pairs.

    Attributes:
        prompts: drawn.
        small_spread: prompts left out by ``min_spread``.
        without_pair: other prompts, of which every pair was left out.
        pairs: of the prompts that are not left out.
        small_gap: pairs left out by ``min_gap``.
        near_duplicates: other pairs, left out by ``min_distance``.
    """

    prompts: int
    small_spread: int
    without_pair: int
    pairs: int
    small_gap: int
    near_duplicates: int

    @property
    def kept(self) -> int:
        """Pairs to train on."""
        return self.pairs - self.small_gap - self.near_duplicates

    @property
    def accepted(self) -> float:
        """Share of the prompts that have a pair to train on."""
        return (self.prompts - self.small_spread - self.without_pair) / self.prompts


def filtered(reward: Tensor, latents: Tensor, pairs: Tensor, filters: Filters) -> tuple[Tensor, Counts]:
    """Which of ``pairs`` (P, n, 2) are trained on, (P, n) bool.

    Args:
        reward: (P, K).
        latents: (P, K, C, h, w).
    """
    spread = reward.std(dim=1, correction=0) >= filters.min_spread
    gap = paired_gap(reward, pairs) > filters.min_gap
    apart = paired_distance(latents, pairs) >= filters.min_distance
    kept = spread[:, None] & gap & apart
    wide = int(spread.sum())
    counts = Counts(
        prompts=len(reward),
        small_spread=len(reward) - wide,
        without_pair=wide - int(kept.any(dim=1).sum()),
        pairs=wide * pairs.shape[1],
        small_gap=int((spread[:, None] & ~gap).sum()),
        near_duplicates=int((spread[:, None] & gap & ~apart).sum()),
    )
    return kept, counts


def listed(reward: Tensor, latents: Tensor, filters: Filters) -> tuple[Tensor, Tensor, Counts]:
    """All pictures of each prompt as a list, the best ones first.

    A picture that is nearly the same as a better one of its list is left out. Lists that are left with one picture, or
    whose best and worst differ by no more than ``min_gap``, are left out, too.

    Args:
        reward: (P, K).
        latents: (P, K, C, h, w).

    Returns:
        Places (P, K); which pictures there are, (P, K) bool, none in lists that are left out; and what was left out,
        counting pairs of pictures that follow each other as pairs.
    """
    order = reward.argsort(dim=1, descending=True, stable=True)
    present = torch.ones_like(order, dtype=torch.bool)
    for place in range(1, order.shape[1]):
        for better in range(place):
            near = paired_distance(latents, order[:, [better, place]][:, None])[:, 0] < filters.min_distance
            present[:, place] &= ~(near & present[:, better])
    spread = reward.std(dim=1, correction=0) >= filters.min_spread
    ranked = reward.gather(1, order)
    lowest = torch.where(present, ranked, ranked[:, :1]).amin(dim=1)
    apart = (ranked[:, 0] - lowest > filters.min_gap) & (present.sum(dim=1) > 1)
    wide, pictures = int(spread.sum()), order.shape[1]
    kept = spread & apart
    duplicates = int((~present)[spread].sum())
    counts = Counts(
        prompts=len(reward),
        small_spread=len(reward) - wide,
        without_pair=wide - int(kept.sum()),
        pairs=wide * (pictures - 1),
        small_gap=int((present[spread & ~apart].sum(dim=1) - 1).sum()),
        near_duplicates=duplicates,
    )
    return order, present & kept[:, None], counts
