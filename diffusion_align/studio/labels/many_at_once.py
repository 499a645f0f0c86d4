"""More than two pictures of one prompt: a Swiss tournament, and circles in what was said of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from diffusion_align.studio.sources.keyed import share

from .verdicts import Verdict, outcomes

Match = tuple[int, int]


def swiss_rounds(count: int) -> int:
    """ceil(log2 K)."""
    return max(1, math.ceil(math.log2(count)))


def points(verdicts: Iterable[Verdict], count: int) -> list[float]:
    """Points of each of ``count`` pictures: 1 a win, ½ a tie (both bad and skip are ties), and 1 for sitting out a
    round."""
    found: list[float] = [0.0] * count
    played: dict[int, set[int]] = {}
    for verdict in verdicts:
        played.setdefault(verdict.round, set()).update(verdict.shown)
        if verdict.choice == "better" and verdict.best is not None:
            found[verdict.best] += 1
        else:
            for picture in verdict.shown:
                found[picture] += 0.5
    for there in played.values():
        for picture in range(count):
            if count % 2 and len(there) == count - 1 and picture not in there:
                found[picture] += 1
    return found


def swiss_matches(key: str, verdicts: Sequence[Verdict], count: int, seed: int) -> tuple[int, list[Match]]:
    """The round that a unit is in and the matches of it that are not judged; (rounds, []) when it is over.

    Pictures with equal points meet, and none meets another twice while that is possible. Where the number is odd, the
    last one that did not sit out before does.
    """
    for turn in range(swiss_rounds(count)):
        before = [verdict for verdict in verdicts if verdict.round < turn]
        judged = {tuple(sorted(verdict.shown)) for verdict in verdicts if verdict.round == turn}
        matches = pairing(key, before, count, seed, turn)
        if left := [match for match in matches if match not in judged]:
            return turn, left
    return swiss_rounds(count), []


def pairing(key: str, before: Sequence[Verdict], count: int, seed: int, turn: int) -> list[Match]:
    """The matches of round ``turn`` after ``before``."""
    scores = points(before, count)
    played = {tuple(sorted(verdict.shown)) for verdict in before}
    order = sorted(range(count), key=lambda i: (-scores[i], share(seed, key, "swiss", turn, i)))
    if count % 2:
        rounds = {verdict.round for verdict in before}
        sat = {
            picture
            for past in rounds
            for picture in range(count)
            if all(picture not in verdict.shown for verdict in before if verdict.round == past)
        }
        resting = next((picture for picture in reversed(order) if picture not in sat), order[-1])
        order.remove(resting)
    return _matched(order, played) or [tuple(sorted(order[i : i + 2])) for i in range(0, len(order), 2)]  # type: ignore[misc]


def _matched(order: list[int], played: set[tuple[int, ...]]) -> list[Match]:
    """Neighbours that have not met; [] where no such pairing exists."""
    if not order:
        return []
    first, *rest = order
    for place, other in enumerate(rest):
        match = (min(first, other), max(first, other))
        if match in played:
            continue
        remaining = rest[:place] + rest[place + 1 :]
        further = _matched(remaining, played)
        if further or not remaining:
            return [match, *further]
    return []


def contradictions(verdicts: Iterable[Verdict]) -> dict[str, list[list[int]]]:
    """Circles (A beats B beats C beats A) in one annotator's verdicts, by unit: the pictures that are in one.

    Pairs that came back are no part of it: they are what self-agreement counts.
    """
    wins: dict[str, dict[int, set[int]]] = {}
    for verdict in verdicts:
        for outcome in outcomes(verdict) if verdict.visit == 0 else ():
            if outcome.label != 0.5:
                winner, loser = (
                    (outcome.first, outcome.second) if outcome.label == 1 else (outcome.second, outcome.first)
                )
                wins.setdefault(verdict.unit, {}).setdefault(winner, set()).add(loser)
    found = {}
    for unit, graph in wins.items():
        reach = {picture: _reached(graph, picture) for picture in graph}
        circles = {
            tuple(sorted(other for other in reach[picture] if picture in reach.get(other, ())))
            for picture in graph
            if picture in reach[picture]
        }
        if circles:
            found[unit] = [list(circle) for circle in sorted(circles)]
    return found


def _reached(graph: Mapping[int, set[int]], start: int) -> set[int]:
    """Everything that ``start`` beats, also over others."""
    found: set[int] = set()
    todo = list(graph.get(start, ()))
    while todo:
        picture = todo.pop()
        if picture not in found:
            found.add(picture)
            todo += graph.get(picture, ())
    return found
