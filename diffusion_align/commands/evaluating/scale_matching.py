"""Guidance scales at which sides are put beside each other: scorers love large ones, whatever else a side does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffusion_align.commands.generate import build_guider, draw
from diffusion_align.commands.options import GenerateOptions
from diffusion_align.evaluation.arena import Contest
from diffusion_align.evaluation.arena.term_length import TermMeter, scale_of_length
from diffusion_align.rewards import load_scorer

from .picture_drawing import Drawer, at_scale
from .picture_jobs import Jobs
from .picture_scoring import Bench
from .side_opening import Side

#: Ways to guide that --guidance-scale is the (mean) scale of.
SCALED = ("constant", "linear", "cosine", "power", "interval", "contrastive")
#: Scales found by measuring are rounded to this.
DECIMALS = 2


@dataclass(frozen=True)
class Plan:
    """What is drawn, and what is put beside what.

    Attributes:
        entries: how the pictures of each are drawn, by name; None: they are in a folder.
        contests: the headline ones first.
        ranked: entries of the order by strength, with the baseline among them.
        baseline: its name in ``ranked``.
        curves: by side, mean score of the first scorer by scale, on the validation prompts.
        scales: by entry, at which scale it is and why, in words.
    """

    entries: Mapping[str, GenerateOptions | None]
    contests: Sequence[Contest]
    ranked: Sequence[str]
    baseline: str
    curves: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)


def plain_plan(sides: Sequence[Side], baseline: str) -> Plan:
    """Every side as it is, beside the baseline."""
    names = [side.name for side in sides]
    contests = [Contest(name, baseline) for name in names if name != baseline]
    return Plan({side.name: side.drawing for side in sides}, contests, names, baseline)


def check_matching(sides: Sequence[Side], match: str, baseline: str) -> None:
    """Whether scales can be matched at all.

    Raises:
        ValueError: the side that has no scale is named.
    """
    for side in sides if match != "none" else ():
        if side.drawing is None:
            raise ValueError(f"--match {match}: side {side.name} is a folder of pictures, which has one scale only")
        if side.drawing.guidance not in SCALED and (match == "scale" or side.name == baseline):
            raise ValueError(
                f"--match {match}: guidance {side.drawing.guidance} of side {side.name} has no scale to choose"
                + ("; --match effective measures what it amounts to" if match == "scale" else "")
            )


def best_scales(
    sides: Sequence[Side],
    baseline: str,
    scorer: str,
    sweep: Sequence[float],
    drawer: Drawer,
    bench: Bench,
    jobs: Jobs,
) -> Plan:
    """Each side at the scale that ``scorer`` likes best on the validation prompts; beside that, unmatched, as it
    was given."""
    curves: dict[str, dict[float, float]] = {}
    entries: dict[str, GenerateOptions | None] = {}
    for side in sides:
        assert side.drawing is not None  # check_matching
        tried = {scale: at_scale(side.drawing, scale) for scale in sorted(set(sweep))}
        drawn = {
            f"{side.name} at {scale:g}": drawer.draw(f"{side.name} at {scale:g}", settings, jobs, "sweep")
            for scale, settings in tried.items()
        }
        scores = bench.scores(scorer, drawn, jobs, "sweep")
        curves[side.name] = {scale: float(scores[f"{side.name} at {scale:g}"].mean()) for scale in tried}
        best = max(curves[side.name], key=lambda scale: curves[side.name][scale])
        entries[side.name] = tried[best]
    given = {side.name: as_given(side) for side in sides}
    for side in sides:
        if entries[side.name] == side.drawing:
            given[side.name] = side.name
        else:
            entries[given[side.name]] = side.drawing
    others = [side.name for side in sides if side.name != baseline]
    contests = [Contest(name, baseline, "matched") for name in others]
    contests += [Contest(given[name], given[baseline], "unmatched") for name in others]
    scales = {
        name: f"{settings.guidance_scale:g}" + (f", best of the sweep by {scorer}" if name in curves else ", as given")
        for name, settings in entries.items()
        if settings is not None
    }
    return Plan(entries, contests, [side.name for side in sides], baseline, curves, scales)


def as_given(side: Side) -> str:
    """What an entry is called that is not at its best scale."""
    return f"{side.name} (as given)"


def effective_scales(sides: Sequence[Side], baseline: str, sweep: Sequence[float], drawer: Drawer, jobs: Jobs) -> Plan:
    """Each side beside the baseline at the scale at which its guidance term is as long as the side's, measured on the
    validation prompts; beside that, unmatched, beside the baseline as it was given."""
    by_name = {side.name: side for side in sides}
    base = by_name[baseline].drawing
    assert base is not None  # check_matching
    measured = {scale: term_length(drawer, at_scale(base, scale), jobs) for scale in sorted(set(sweep))}
    entries: dict[str, GenerateOptions | None] = {side.name: side.drawing for side in sides}
    contests, scales = [], {}
    for side in sides:
        if side.name == baseline or side.drawing is None:
            continue
        scale = round(scale_of_length(term_length(drawer, side.drawing, jobs), measured), DECIMALS)
        matched = at_scale(base, scale)
        name = baseline if matched == base else f"{baseline} at {scale:g}"
        entries[name] = matched
        scales[name] = f"{scale:g}, where its guidance term is as long as that of {side.name}"
        contests.append(Contest(side.name, name, "matched"))
    contests += [Contest(side.name, baseline, "unmatched") for side in sides if side.name != baseline]
    return Plan(entries, contests, [side.name for side in sides], baseline, {}, scales)


def term_length(drawer: Drawer, options: GenerateOptions, jobs: Jobs) -> float:
    """Mean length of the guidance term over the validation prompts."""
    model, meter = drawer.model(options), TermMeter()
    scorer = None if options.search == "none" else load_scorer(str(options.scorer)).to(model.device)
    guider, pairs = build_guider(options), jobs.pairs()
    for chunk in jobs.chunks(options.batch_size):
        batch = [pairs[i] for i in chunk]
        prompts, seeds = [prompt for prompt, _ in batch], [seed for _, seed in batch]
        draw(model, options, guider, scorer, prompts, seeds, None, meter)
    return meter.mean()
