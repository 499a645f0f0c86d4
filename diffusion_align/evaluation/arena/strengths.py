"""How strong each of several sides is, from all comparisons at once: Bradley and Terry's model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Points of Elo's scale per unit of log-odds.
ELO = 400.0 / math.log(10.0)
#: Precision of the prior N(0, 1 / PRIOR) of each strength: light, it keeps a side that always wins finite.
PRIOR = 0.1
#: Resamples that are fitted at once.
BLOCK = 250


@dataclass(frozen=True)
class Strength:
    """One side's place.

    Attributes:
        elo: 400 points are odds of 10 to 1; the baseline has 1000.
        interval: of the difference from the baseline, by resampling prompts; the baseline's own has no width.
        rank: first and last place that the data leave open: as many sides are surely better as stand before the first.
        games: comparisons that it was in.
    """

    name: str
    elo: float
    interval: tuple[float, float]
    rank: tuple[int, int]
    games: float

    def __str__(self) -> str:
        first, last = self.rank
        place = str(first) if first == last else f"{first}-{last}"
        return f"{self.name}: {self.elo:.0f} [{self.interval[0]:.0f}, {self.interval[1]:.0f}], rank {place}"


def strengths(
    wins: Array, names: Sequence[str], baseline: str, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[Strength]:
    """Strengths theta of P(a beats b) = sig(theta_a - theta_b), ties counted as half a win for both, order-free.

    The fit maximises sum wins_ab log sig(theta_a - theta_b) - PRIOR / 2 |theta|^2. Intervals are percentiles of fits to
    resampled prompts. A side's first place is 1 + the number of sides whose difference to it has an interval above 0.

    Args:
        wins: (prompts, sides, sides); [p, a, b] is how often a beat b on prompt p, ties as 1/2 on both.
        baseline: whose strength is 1000.

    Raises:
        ValueError: wrong shapes, an unknown baseline, or sides that no comparison connects; the groups are named.
    """
    count = len(names)
    if wins.ndim != 3 or wins.shape[1:] != (count, count) or not len(wins):
        raise ValueError(f"wins: expected (prompts, {count}, {count}), got {wins.shape}")
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r}: expected one of {', '.join(names)}")
    groups = connected(wins.sum(axis=0), names)
    if len(groups) > 1:
        told = "; ".join(", ".join(group) for group in groups)
        raise ValueError(f"no comparison connects these groups of sides, so they have no common scale: {told}")
    base = list(names).index(baseline)
    theta = fit(wins.sum(axis=0)[None])[0]
    rng = np.random.default_rng(seed)
    tables = wins.reshape(len(wins), -1)
    drawn = []
    for start in range(0, resamples, BLOCK):
        weights = rng.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=min(BLOCK, resamples - start))
        drawn.append(fit((weights @ tables).reshape(-1, count, count)))
    found = np.concatenate(drawn)
    tail = (1 - confidence) / 2
    low, high = np.quantile(found[:, :, None] - found[:, None, :], [tail, 1 - tail], axis=0)  # a minus b
    games = wins.sum(axis=0) + wins.sum(axis=0).T
    return [
        Strength(
            name,
            1000 + ELO * float(theta[a] - theta[base]),
            (1000 + ELO * float(low[a, base]), 1000 + ELO * float(high[a, base])),
            (1 + int((low[:, a] > 0).sum()), count - int((high[:, a] < 0).sum())),
            float(games[a].sum()),
        )
        for a, name in enumerate(names)
    ]


def fit(wins: Array, steps: int = 50) -> Array:
    """Strengths (R, sides) of R tables of wins (R, sides, sides), by Newton's method; their mean is 0."""
    sides = wins.shape[1]
    theta = np.zeros(wins.shape[:2])
    games = wins + wins.transpose(0, 2, 1)
    eye = np.eye(sides)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-(theta[:, :, None] - theta[:, None, :])))
        gradient = (wins - games * p).sum(axis=2) - PRIOR * theta
        curve = games * p * (1 - p)
        hessian = eye * (curve.sum(axis=2) + PRIOR)[:, :, None] - curve * (1 - eye)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        # A full step from 0 overshoots where one side wins nearly all: the curve is flat far out.
        theta = theta + np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-10:
            break
    return theta


def connected(wins: NDArray[np.floating[Any]], names: Sequence[str]) -> list[list[str]]:
    """Names of the sides in groups that comparisons connect, in the order of the first of each."""
    from scipy.sparse.csgraph import connected_components

    _, label = connected_components((wins + wins.T) > 0, directed=False)
    return [[name for name, of in zip(names, label, strict=True) if of == group] for group in dict.fromkeys(label)]
