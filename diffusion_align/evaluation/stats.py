"""Win rates and paired differences, each with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = Any  # anything NumPy reads as (n,) numbers, or a torch tensor of any float dtype and device


@dataclass(frozen=True)
class WinRate:
    """How often A beats B; ``rate`` = (wins + ties / 2) / count, in [0, 1]."""

    wins: int
    losses: int
    ties: int
    rate: float
    interval: tuple[float, float]
    count: int
    confidence: float = 0.95

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} [{low:.1%}, {high:.1%}] (n={self.count})"

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict that ``json.dumps`` accepts; ``interval`` becomes a list ``[low, high]``."""
        return {**asdict(self), "interval": list(self.interval)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> WinRate:
        """From what :meth:`to_json` made."""
        return cls(**{**fields, "interval": tuple(fields["interval"])})


@dataclass(frozen=True)
class MeanInterval:
    """A sample mean with its standard error and two-sided confidence interval."""

    mean: float
    interval: tuple[float, float]
    standard_error: float
    count: int
    confidence: float = 0.95

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.4g} [{low:.4g}, {high:.4g}] (n={self.count})"

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict that ``json.dumps`` accepts; ``interval`` becomes a list ``[low, high]``."""
        return {**asdict(self), "interval": list(self.interval)}


def win_rate(scores_a: Scores, scores_b: Scores, *, tie_margin: float = 0.0, confidence: float = 0.95) -> WinRate:
    """Win rate of A over B on the same examples, with the Wilson score interval.

    ``scores_a`` and ``scores_b`` are (n,) with row i scoring the same prompt; higher is better. Row i is a tie when
    ``|a - b| <= tie_margin``. A tie counts half, p = (wins + ties / 2) / n, and the interval is Wilson's (1927)

        (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n).

    Without ties this is the exact Wilson interval. With ties it is conservative: an outcome in {0, 1/2, 1} with mean
    p has a variance of at most p (1 - p).

    Raises ``ValueError`` on empty, non-finite, not 1-D or unequally long scores, on a negative or non-finite
    ``tie_margin``, or on a ``confidence`` outside (0, 1). Rows must be independent: for several seeds on the same
    prompts use :func:`clustered_win_rate`.
    """
    _check_confidence(confidence)
    outcomes = _outcomes(_paired(scores_a, scores_b), tie_margin)
    return _summary(outcomes, _wilson(float(outcomes.mean()), outcomes.size, confidence), confidence)


def clustered_win_rate(
    differences: Sequence[Scores],
    *,
    tie_margin: float = 0.0,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> WinRate:
    """Win rate over several training seeds that were evaluated on the same prompts.

    ``differences`` holds one (n_prompts,) array per training seed: score of the trained model minus score of the
    baseline, prompts in the same order. All seeds x prompts comparisons are counted, but the comparisons of one prompt
    are correlated, so the interval is a percentile bootstrap that resamples whole prompts (clusters), with a fixed
    ``seed``. It generalises over prompts for *these* training seeds; it says nothing about a new seed.

    When every prompt has the same mean outcome the bootstrap has no spread and would claim certainty; the Wilson
    interval of ``n_prompts`` comparisons is given instead.

    Raises ``ValueError`` as :func:`win_rate` does, for an empty list, and when a seed has another number of prompts.
    """
    _check_confidence(confidence)
    if resamples < 100:
        raise ValueError(f"resamples: expected at least 100, got {resamples}")
    if len(differences) == 0:
        raise ValueError("differences: expected one array per training seed, got none")
    per_seed = [_vector(values, f"differences[{index}]") for index, values in enumerate(differences)]
    for index, values in enumerate(per_seed):
        if values.size != per_seed[0].size:
            raise ValueError(
                f"differences[{index}]: expected {per_seed[0].size} prompts as in differences[0], got {values.size}"
            )
    outcomes = _outcomes(np.stack(per_seed), tie_margin)
    by_prompt = outcomes.mean(axis=0)
    if np.ptp(by_prompt) == 0.0:
        return _summary(outcomes, _wilson(float(by_prompt[0]), by_prompt.size, confidence), confidence)
    interval, _ = _bootstrap(by_prompt, confidence, resamples, seed)
    return _summary(outcomes, interval, confidence)


def clustered_mean(
    by_prompt: Scores, *, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> MeanInterval:
    """Mean over prompts with a percentile bootstrap that resamples prompts, as :func:`clustered_win_rate` does.

    ``by_prompt`` is (n_prompts,), a mean over each prompt's pictures or verdicts. Raises ``ValueError`` as
    :func:`win_rate` does, and for fewer than 100 resamples.
    """
    _check_confidence(confidence)
    if resamples < 100:
        raise ValueError(f"resamples: expected at least 100, got {resamples}")
    values = _vector(by_prompt, "by_prompt")
    interval, error = _bootstrap(values, confidence, resamples, seed)
    return MeanInterval(float(values.mean()), interval, error, values.size, confidence)


def paired_difference(scores_a: Scores, scores_b: Scores, *, confidence: float = 0.95) -> MeanInterval:
    """Mean of ``a - b`` over the same examples with Student's t interval, mean ± t(n - 1) s / sqrt(n).

    ``scores_a`` and ``scores_b`` are (n,), n >= 2, row i scoring the same prompt. Raises ``ValueError`` as
    :func:`win_rate` does, and for fewer than two rows.
    """
    _check_confidence(confidence)
    difference = _paired(scores_a, scores_b)
    if difference.size < 2:
        raise ValueError("scores_a: an interval needs at least 2 rows, got 1")
    from scipy import stats  # slow to import, and only needed here

    mean = float(difference.mean())
    error = float(difference.std(ddof=1)) / math.sqrt(difference.size)
    half = float(stats.t.ppf(0.5 + confidence / 2.0, difference.size - 1)) * error
    return MeanInterval(mean, (mean - half, mean + half), error, difference.size, confidence)


def _bootstrap(
    by_prompt: NDArray[np.float64], confidence: float, resamples: int, seed: int
) -> tuple[tuple[float, float], float]:
    """Percentile interval and standard error of a mean over prompts."""
    rng = np.random.default_rng(seed)
    # One resample at a time: a (resamples, n_prompts) index table would need gigabytes on large prompt sets.
    means = [by_prompt[rng.integers(by_prompt.size, size=by_prompt.size)].mean() for _ in range(resamples)]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return (float(low), float(high)), float(np.std(means))


def _wilson(rate: float, count: int, confidence: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    scale = 1.0 + z * z / count
    centre = (rate + z * z / (2 * count)) / scale
    half = z * math.sqrt(rate * (1.0 - rate) / count + z * z / (4 * count * count)) / scale
    # At a rate of 0 or 1 the bound is exact in theory; rounding could put it a hair on the wrong side.
    return (0.0 if rate == 0.0 else max(0.0, centre - half), 1.0 if rate == 1.0 else min(1.0, centre + half))


def _outcomes(difference: NDArray[np.float64], tie_margin: float) -> NDArray[np.float64]:
    if not (math.isfinite(tie_margin) and tie_margin >= 0.0):
        raise ValueError(f"tie_margin: expected a finite number >= 0, got {tie_margin}")
    return np.where(np.abs(difference) <= tie_margin, 0.5, (difference > 0.0).astype(np.float64))


def _summary(outcomes: NDArray[np.float64], interval: tuple[float, float], confidence: float) -> WinRate:
    wins, losses = int((outcomes == 1.0).sum()), int((outcomes == 0.0).sum())
    ties = outcomes.size - wins - losses
    return WinRate(wins, losses, ties, float(outcomes.mean()), interval, outcomes.size, confidence)


def _paired(scores_a: Scores, scores_b: Scores) -> NDArray[np.float64]:
    a, b = _vector(scores_a, "scores_a"), _vector(scores_b, "scores_b")
    if a.size != b.size:
        raise ValueError(f"scores_b: expected {a.size} rows as in scores_a, got {b.size}")
    return a - b


def _vector(values: Scores, name: str) -> NDArray[np.float64]:
    # NumPy has no bfloat16, and cannot read tensors that need a gradient or live on a GPU.
    raw = values.detach().cpu().double().numpy() if hasattr(values, "detach") else values
    try:
        vector = np.asarray(raw, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a 1-D array of numbers, got {type(values).__name__}") from error
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name}: expected a non-empty 1-D array, got shape {vector.shape}")
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise ValueError(f"{name}: row {bad[0]} is {vector[bad[0]]}, expected finite scores ({bad.size} bad rows)")
    return vector


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
