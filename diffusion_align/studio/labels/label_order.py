"""In which order pictures are asked about, and with which probability each was drawn at its turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffusion_align.studio.sources.keyed import opaque, share

#: random: by a hash; file: as they stand; active: mostly those that scorers disagree about or find close.
Order = Literal["random", "file", "active"]
#: Share of an active order that is drawn uniformly, so that rates over all pairs stay estimable.
UNIFORM = 0.25


def ordered(
    keys: Sequence[str], order: Order, seed: int, annotator: str, gaps: Mapping[str, Sequence[float]] | None = None
) -> list[tuple[int, float | None]]:
    """Places of ``keys`` in the order in which ``annotator`` meets them, and p_selected of each (None for "file").

    Args:
        gaps: by scorer, score of the first picture minus that of the second for each key; for "active".

    Raises:
        ValueError: active without two scorers, or a score that is no number.
    """
    if order == "file":
        return [(place, None) for place in range(len(keys))]
    if order == "random":
        places = sorted(range(len(keys)), key=lambda place: share(seed, annotator, "order", keys[place]))
        return [(place, 1 / (len(keys) - turn)) for turn, place in enumerate(places)]
    return _active(interest(keys, gaps or {}), int(opaque(seed, annotator, "active")[:8], 16))


def interest(keys: Sequence[str], gaps: Mapping[str, Sequence[float]]) -> NDArray[np.float64]:
    """How much a verdict would say, (keys,) > 0: the spread of the scorers' standardised differences, and more where
    their mean is near 0.

    Raises:
        ValueError: fewer than two scorers, or a score that is no number.
    """
    if len(gaps) < 2:
        raise ValueError(
            f"order active needs the scores of at least 2 scorers (score_0_NAME, score_1_NAME), found {len(gaps)}"
        )
    table = np.array([list(values) for values in gaps.values()], dtype=np.float64)
    if table.shape[1] != len(keys) or not np.isfinite(table).all():
        raise ValueError("order active: expected a finite score of every scorer for every picture")
    # Signs are what preference is about, so differences are scaled and not centred.
    units = table / np.maximum(np.sqrt((table**2).mean(axis=1, keepdims=True)), 1e-12)
    spread, gap = units.std(axis=0), np.abs(units.mean(axis=0))
    weight: NDArray[np.float64] = spread + np.exp(-gap) + 1e-9
    return weight


def _active(weights: NDArray[np.float64], seed: int) -> list[tuple[int, float | None]]:
    """Drawn without replacement, with p = UNIFORM / n + (1 - UNIFORM) w / sum(w) of the n that are left."""
    rng = np.random.default_rng(seed)
    left = np.arange(len(weights))
    found: list[tuple[int, float | None]] = []
    while len(left):
        chances = UNIFORM / len(left) + (1 - UNIFORM) * weights[left] / weights[left].sum()
        sums = chances.cumsum()
        turn = min(int(np.searchsorted(sums, rng.random() * sums[-1], side="right")), len(left) - 1)
        found.append((int(left[turn]), float(chances[turn])))
        left = np.delete(left, turn)
    return found
