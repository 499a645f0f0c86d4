"""From verdicts on pairs of one prompt to the order of its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Verdict:
    """One judged pair: numbers of its pictures, and P(the first is better), 0.5 for a tie."""

    first: int
    second: int
    preferred: float


@dataclass(frozen=True)
class Order:
    """The order of K pictures.

    Attributes:
        ranks: 0 is the best, without gaps; equal ones are ties, of pictures that no chain of verdicts tells apart.
        cycles: circles of verdicts (A over B over C over A).
        open: pictures of circles that have won as often as another one of their circle, together; their ranks are
            equal, and nothing but another judge can say more.
        against: pairs whose majority the order contradicts; only pairs of circles.
    """

    ranks: tuple[int, ...]
    cycles: int
    open: tuple[tuple[int, ...], ...]
    against: int


def votes(count: int, verdicts: Iterable[Verdict]) -> NDArray[np.float64]:
    """(K, K): how often picture i was preferred to picture j; a tie is half a time each."""
    found = np.zeros((count, count))
    for each in verdicts:
        found[each.first, each.second] += each.preferred
        found[each.second, each.first] += 1 - each.preferred
    return found


def order_by(wins: NDArray[np.float64], scores: NDArray[np.float64] | None = None) -> Order:
    """The order that agrees with the majority of every pair, if there is one.

    A picture's place is the length of the longest chain of majorities that leads to it: A over B over C gives 0, 1, 2.
    Pictures of a circle share a place there. They are ordered by wins minus losses in the whole list, and where these
    are equal by ``scores``.

    Args:
        wins: (K, K), of :func:`votes`.
        scores: (K,), larger is better; None leaves such pictures equal, and names them as ``open``.
    """
    count, net = len(wins), wins - wins.T
    over = net > 0
    reach = over.copy()
    for middle in range(count):
        reach |= reach[:, middle, None] & reach[None, middle]
    circle = (reach & reach.T) | np.eye(count, dtype=bool)
    # Whoever reaches more pictures comes first: this is an order of the circles in which chains go forwards only.
    levels = np.zeros(count, dtype=int)
    for place in np.argsort(-(reach & ~circle).sum(axis=1), kind="stable").tolist():
        before = np.flatnonzero((over & ~circle)[:, circle[place]].any(axis=1))
        levels[circle[place]] = levels[before].max(initial=-1) + 1
    balance = np.where(circle.sum(axis=1) > 1, net.sum(axis=1), 0.0)
    further = np.zeros(count)
    left_open: list[tuple[int, ...]] = []
    for place in range(count):
        equal = np.flatnonzero(circle[place] & (balance == balance[place]))
        if len(equal) > 1 and equal[0] == place:
            if scores is None:
                left_open.append(tuple(equal.tolist()))
            else:
                further[equal] = scores[equal]
    keys = list(zip(levels.tolist(), (-balance).tolist(), (-further).tolist(), strict=True))
    places = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    ranks = np.array([places[key] for key in keys])
    against = int((over & (ranks[:, None] >= ranks[None])).sum())
    cycles = len({tuple(row) for row in circle.tolist() if sum(row) > 1})
    return Order(tuple(ranks.tolist()), cycles, tuple(left_open), against)


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The numbers 0 .. count - 1 in groups that pairs connect, each ascending, by their first ones."""
    roots = list(range(count))

    def root(number: int) -> int:
        while roots[number] != number:
            roots[number] = roots[roots[number]]
            number = roots[number]
        return number

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        roots[high] = low
    groups: dict[int, list[int]] = {}
    for number in range(count):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


def contradicted(wins: NDArray[np.float64]) -> int:
    """Pairs on which verdicts differ: both pictures were preferred, once each or more."""
    return int(((wins >= 1) & (wins.T >= 1)).sum()) // 2


def numbered(names: Sequence[str]) -> dict[str, int]:
    """Numbers of distinct names in the order of their first appearance."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}
