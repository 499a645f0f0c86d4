"""The table of ways to guide, row by row: each beside the best static scale and beside the scale it amounts to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance
from torch import Tensor

from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.guider import EXPERIMENTAL
from diffusion_align.guidance.schedules import ScheduleGuidance, TableGuidance
from diffusion_align.quiet import unsaid
from diffusion_align.rewards import RewardScorer

from .guidance import OTHER_SEEDS, Draw, GuidanceComparison, GuidanceTrial

#: Effective scales are rounded to this before classifier-free guidance is drawn there.
DECIMALS = 1
#: Told a row's name and what it gave.
Show = Callable[[str, GuidanceTrial], object]


@dataclass(frozen=True)
class Way:
    """A row of the table.

    Attributes:
        name: of the row.
        draw: from ``GuidanceComparison``.
        nominal: the scale that it is set to; None where it has none.
        bound: whether it is told by the judge, and so shows how much room there is, and no way to guide.
    """

    name: str
    draw: Draw
    nominal: float | None = None
    bound: bool = False


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is put beside the best static scale.

    Attributes:
        curve: static scales, drawn on the test prompts to be looked at, not to choose from.
        dynamic: named settings of dynamic guidance. The first one's mean schedule is tried as a fixed one, too, and its
            mean scale of each prompt as that prompt's.
        per_prompt: scales of which each prompt gets its best one, by the judge on other seeds: a bound.
        bound: scorer that picks the first dynamic setting's candidates at each step, on decoded predictions: a bound.
        selector: scorer of the best-of-2 row.
        stops: shares of the steps that Step AG guides.
        usual: named guiders with the best static scale as their (mean) scale.
        ways: further ones.
        matched: whether each row is also put beside classifier-free guidance at its effective scale, 1 or more.
    """

    curve: Sequence[float] = ()
    dynamic: Mapping[str, DynamicGuidance] = field(default_factory=dict)
    per_prompt: Sequence[float] = ()
    bound: RewardScorer | None = None
    selector: RewardScorer | None = None
    stops: Sequence[float] = ()
    usual: Mapping[str, Any] = field(default_factory=dict)
    ways: Iterable[Way] = ()
    matched: bool = False


def usual_ways(static: float) -> dict[str, Any]:
    """What a user would try first, with the best static scale as their (mean) scale."""
    with unsaid(EXPERIMENTAL):
        apg = AdaptiveProjectedGuidance(guidance_scale=static, eta=0.0)
        zero_star = ClassifierFreeZeroStarGuidance(guidance_scale=static)
    return {
        "interval": ScheduleGuidance(static, sigma_low=0.28, sigma_high=5.42),  # 2404.07724's, for ImageNet
        "linear": ScheduleGuidance(static, "linear"),
        "cosine": ScheduleGuidance(static, "cosine"),
        "APG": apg,
        "CFG-Zero*": zero_star,
    }


class GuidanceTable:
    """Rows as they are measured.

    Args:
        static: the best static scale, by validation: what all rows are put beside.
        matched: whether rows are also put beside static guidance at their effective scale.
        show: is told the name of each row that was drawn, and what it gave.
    """

    def __init__(
        self,
        comparison: GuidanceComparison,
        static: float,
        matched: bool = False,
        show: Show = lambda name, trial: None,
    ) -> None:
        if matched and not comparison.measured:
            raise ValueError("rows at matched scale need measured prompts, to find the effective scale on")
        self.comparison, self.best, self.matched, self.show = comparison, static, matched, show
        self._static: dict[float, GuidanceTrial] = {}

    def static(self, scale: float) -> GuidanceTrial:
        """Static guidance; drawn once, whoever asks."""
        if scale not in self._static:
            self._static[scale] = self.comparison.run(self.comparison.guided(float(scale)))
        return self._static[scale]

    def row(self, way: Way, trial: GuidanceTrial) -> dict[str, Any]:
        """A way's row, from what it gave."""
        row = trial.table_row(self.static(self.best)) | {"nominal_scale": way.nominal, "bound": way.bound}
        if self.matched and trial.effective is not None and math.isfinite(trial.effective.scale):
            scale = max(1.0, round(trial.effective.scale, DECIMALS))  # below 1 nothing is guided
            cfg = self.static(scale)
            row["matched"] = {
                "scale": scale, "nfe": cfg.nfe, "win_rate": trial.win_rate(cfg), "over": trial.over(cfg),
            }  # fmt: skip
        return row

    def rows(self, way: Way, trial: GuidanceTrial | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """A way's row, and before it static guidance at its effective scale where that has none yet.

        Args:
            trial: what it gave, if it was drawn already.
        """
        known = set(self._static)
        trial = trial or self.comparison.measured_run(way.draw)
        row = self.row(way, trial)
        for scale in sorted(set(self._static) - known):
            yield self.static_row(scale)
        self.show(way.name, trial)
        yield way.name, row

    def static_row(self, scale: float) -> tuple[str, dict[str, Any]]:
        """Static guidance at ``scale``; it amounts to itself."""
        name, trial = f"static {scale:g}", self.static(scale)
        known = {"nominal_scale": scale, "effective_scale": float(scale), "orthogonal_share": 0.0, "bound": False}
        self.show(name, trial)
        return name, trial.table_row(self.static(self.best)) | known


def compare_guidance(
    comparison: GuidanceComparison, static: float, rows: Rows, show: Show = lambda name, trial: None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The table, row by row: a way's name, its means, errors, and win rate over static guidance at ``static``.

    Args:
        show: as of ``GuidanceTable``.
    """
    table = GuidanceTable(comparison, static, rows.matched, show)
    yield table.static_row(static)
    for scale in rows.curve:
        if scale != static:
            yield table.static_row(scale)
    if len(rows.curve) > 1:
        yield hindsight(table, rows.curve)
    for i, (name, guider) in enumerate(rows.dynamic.items()):
        way = Way(f"dynamic, {name}", comparison.guided(guider))
        trial = comparison.measured_run(way.draw)
        yield from table.rows(way, trial)
        if i == 0:
            mean = TableGuidance(trial.scales.mean(dim=(0, 2)).tolist())
            yield from table.rows(Way("mean of the dynamic schedules", comparison.guided(mean)))
            of_prompts = TableGuidance(trial.scales.mean(dim=(0, 1)).tolist(), per_image=True)
            yield from table.rows(Way("one scale per prompt, mean of the dynamic", comparison.guided(of_prompts)))
            if rows.bound is not None:
                yield from table.rows(picked_by(comparison, rows.bound, guider))
    if rows.per_prompt:
        yield from table.rows(best_per_prompt(comparison, rows.per_prompt))
    for way in chain(other_ways(comparison, static, rows), rows.ways):
        yield from table.rows(way)


def other_ways(comparison: GuidanceComparison, static: float, rows: Rows) -> Iterator[Way]:
    """Best of 2, Step AG and the usual ways."""
    if rows.selector is not None:
        name = f"best of 2, half the steps, by {rows.selector.name}"
        yield Way(name, comparison.best_of(2, rows.selector, static), static)
    for stop in rows.stops:
        yield from step_ag(comparison, static, stop)
    for name, guider in rows.usual.items():
        yield Way(name, comparison.guided(guider), static)


def step_ag(comparison: GuidanceComparison, static: float, stop: float) -> Iterator[Way]:
    """Guidance in the first ``stop`` of the steps only (Step AG, 2506.08351), and what its calls buy otherwise.

    Its own row takes fewer calls than static guidance. Beside it stand static guidance in fewer steps with as many
    calls as Step AG's, and Step AG in more steps with as many calls as static guidance's, each rounded down.
    """
    steps = comparison.steps
    guider = ScheduleGuidance(static, stop=stop)
    name = f"Step AG, first {stop:.0%}"
    yield Way(name, comparison.guided(guider), static)
    fewer = (steps + round(stop * steps)) // 2
    yield Way(f"static {static:g}, {fewer} steps", comparison.guided(static, fewer), static)
    more = max(count for count in range(steps, 2 * steps + 1) if count + round(stop * count) <= 2 * steps)
    yield Way(f"{name}, {more} steps", comparison.guided(guider, more), static)


def picked_by(comparison: GuidanceComparison, scorer: RewardScorer, like: DynamicGuidance) -> Way:
    """Dynamic guidance with ``scorer`` judging each decoded candidate at each step, and the candidates of ``like``."""
    guider = DynamicGuidance(
        None, (), like.candidates.tolist(), pixel_scorers=(scorer.name or "scorer",), fallback=like.fallback
    )
    guider.use(scorers=[scorer])
    return Way(f"bound: {scorer.name} picks each step's candidate", comparison.guided(guider), bound=True)


def best_per_prompt(comparison: GuidanceComparison, scales: Sequence[float]) -> Way:
    """Each prompt's best static scale by the judge, on other seeds than those that it is then drawn with."""
    seeds = [seed + OTHER_SEEDS for seed in comparison.seeds]
    rewards = np.stack(
        [comparison.run(comparison.guided(float(scale)), seeds).reward.mean(dim=0).numpy() for scale in scales]
    )
    chosen = [float(scales[i]) for i in rewards.argmax(axis=0)]
    guider = TableGuidance(chosen, per_image=True)
    name = f"bound: best scale per prompt, by {comparison.scorer.name} on other seeds"
    return Way(name, comparison.guided(guider), bound=True)


def hindsight(table: GuidanceTable, scales: Sequence[float]) -> tuple[str, dict[str, Any]]:
    """The best of all static scales for each picture, told by the judge after they are all drawn."""
    trials = [table.static(scale) for scale in scales]
    best = torch.stack([trial.reward for trial in trials]).argmax(dim=0)[None]  # (1, seeds, prompts)

    def picked(name: str) -> Tensor:
        return torch.stack([trial.values()[name] for trial in trials]).gather(0, best)[0]

    base = table.static(table.best)
    kept = {name: value for name, value in base.aspects.items() if value.shape == base.reward.shape}
    found = GuidanceTrial(
        picked("reward"), {name: picked(name) for name in kept}, sum(trial.nfe for trial in trials),
        torch.empty(0), sum(trial.seconds for trial in trials),
    )  # fmt: skip
    row = found.table_row(replace(base, aspects=kept))
    name = f"bound: best of {len(scales)} scales per picture, in hindsight"
    return name, row | {"nominal_scale": None, "bound": True}


def slopes(rows: Mapping[str, Mapping[str, Any]], scales: Sequence[float]) -> dict[str, Any]:
    """The curve of static guidance: what each value is at each scale, and how much it grows when the scale doubles.

    A scorer whose slope is positive up to scales where pictures break loves contrast: do not choose by it.

    Args:
        rows: of the table, by name; scales without a row are left out.

    Returns:
        "scales", "values" by name (one per scale), and "per_doubling" by name: the slope of a straight line through
        the values over log2(scale), of scales above 0.
    """
    measured = [scale for scale in sorted(scales) if f"static {scale:g}" in rows and scale > 0]
    found = [rows[f"static {scale:g}"] for scale in measured]
    names = found[0]["over_static"] if found else ()
    values = {name: [row[name]["mean"] for row in found] for name in names}
    slope = {}
    if len(measured) > 1:
        slope = {name: float(np.polyfit(np.log2(measured), column, 1)[0]) for name, column in values.items()}
    return {"scales": measured, "values": values, "per_doubling": slope}
